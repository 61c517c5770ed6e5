"""/health, /ready and /version give the state of the fleet, and the cause if something is wrong."""

import asyncio
import json
from typing import Any, TypeVar

import pytest
from fastapi import FastAPI

from shoal import __version__
from shoal.errors import ClosedError, EngineError
from shoal.server.http.errors import add_handlers
from shoal.server.operations import health
from shoal.wire.base import replace_fields
from shoal.wire.fleet import FleetStatus
from support.asgi import get
from support.fake_backend import FakeBackend
from support.fleet_status import engine, fleet, replica

T = TypeVar("T")


def backend(status: FleetStatus | Exception, started: bytes | Exception = b"yes") -> FakeBackend:
    """Return a fleet that gives this status and this answer to "started", or raises them."""
    return FakeBackend(status=lambda: answer_or_raise(status), verbs={"started": lambda _: answer_or_raise(started)})


def answer_or_raise(answer: T | Exception) -> T:
    if isinstance(answer, Exception):
        raise answer
    return answer


def ask(engine: FakeBackend, path: str, answer_s: float = 60.0) -> tuple[int, Any]:
    app = FastAPI()
    add_handlers(app)
    app.include_router(health.routes(engine, answer_s=answer_s))
    status, body = asyncio.run(get(app, path))
    return status, json.loads(body)


def test_the_version_is_returned_even_without_an_engine() -> None:
    assert ask(backend(ClosedError("gone")), "/version") == (200, {"version": __version__})


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_ready_fleet_is_healthy(path: str) -> None:
    assert ask(backend(fleet(replica(0), replica(1))), path)[0] == 200


def test_a_fleet_with_one_of_two_replicas_is_healthy_but_not_ready() -> None:
    status = fleet(replica(0), replica(1, "restarting", since=3.0, cause="rank 1 died"))
    engine = backend(status, started=b"")
    assert ask(engine, "/health")[0] == 200
    code, body = ask(engine, "/ready")
    assert code == 503
    assert body["error"]["message"] == "not all replicas are ready: replica 1: restarting for 3 s (rank 1 died)"


def test_health_does_not_wait_for_replicas_of_other_hosts() -> None:
    assert ask(backend(fleet(replica(0), replica(1, "awaited"))), "/ready")[0] == 200
    code, body = ask(backend(fleet(replica(0, "starting"), replica(1, "awaited")), started=b""), "/ready")
    assert code == 503
    assert "replica 0: starting" in body["error"]["message"]
    assert "replica 1" not in body["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (backend(fleet(replica(0), accepting=False)), "shutting down"),
        (
            backend(
                replace_fields(fleet(replica(0, "failed"), accepting=False), failure="no replica is left: it died")
            ),
            "no replica is left: it died",
        ),
        (backend(fleet(replica(0, "starting")), started=b""), "replica 0: starting for 1 s"),
        (backend(fleet(), started=b""), "there are no replicas"),
        (backend(fleet(*(replica(number, "failed") for number in range(50))), started=b""), "; 42 more"),
        (backend(ClosedError("the engine was closed")), "the engine was closed"),
    ],
)
def test_an_unhealthy_fleet_gives_the_cause(path: str, engine: FakeBackend, why: str) -> None:
    code, body = ask(engine, path)
    assert code == 503
    assert why in body["error"]["message"]
    assert body["error"]["type"] == "server_error"


def test_ranks_that_are_being_replaced_make_a_fleet_unhealthy_if_no_other_replica_computes() -> None:
    computing = replica(0, stats=engine())
    trouble = "rank 1 (process 17) does nothing in step 9; rank 0 waits for that; it is replaced"
    replacing = replica(1, stats=replace_fields(engine(), trouble=trouble))
    assert ask(backend(fleet(computing, replacing)), "/health")[0] == 200
    code, body = ask(backend(fleet(replacing)), "/health")
    assert (code, body["error"]["message"]) == (503, f"replica 1: {trouble}")


def test_a_replica_that_can_never_start_is_named() -> None:
    engine = backend(fleet(replica(0), replica(1, "failed")), EngineError("replica 1: out of memory"))
    assert ask(engine, "/health")[0] == 200
    code, body = ask(engine, "/ready")
    assert code == 503
    assert "out of memory" in body["error"]["message"]


def test_an_engine_that_does_not_answer_is_unhealthy() -> None:
    class Silent(FakeBackend):
        async def status(self) -> FleetStatus:
            await asyncio.Event().wait()
            raise AssertionError

    code, body = ask(Silent(), "/health", answer_s=0.01)
    assert code == 503
    assert body["error"]["message"] == "the fleet has not answered within 0.01 s"
