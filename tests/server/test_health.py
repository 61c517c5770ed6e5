"""/health, /ready and /version: honest, and with the cause."""

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
from support.fleet_status import fleet, replica

T = TypeVar("T")


def backend(status: FleetStatus | Exception, started: bytes | Exception = b"yes") -> FakeBackend:
    """A fleet that answers with that, or fails with it."""
    return FakeBackend(status=lambda: given(status), verbs={"started": lambda _: given(started)})


def given(answer: T | Exception) -> T:
    if isinstance(answer, Exception):
        raise answer
    return answer


def asked(engine: FakeBackend, path: str, answer_s: float = 60.0) -> tuple[int, Any]:
    app = FastAPI()
    add_handlers(app)
    app.include_router(health.routes(engine, answer_s=answer_s))
    status, body = asyncio.run(get(app, path))
    return status, json.loads(body)


def test_the_version() -> None:
    assert asked(backend(ClosedError("gone")), "/version") == (200, {"version": __version__})


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_all_is_well(path: str) -> None:
    assert asked(backend(fleet(replica(0), replica(1))), path)[0] == 200


def test_with_one_of_two_it_serves_but_is_not_all_there() -> None:
    status = fleet(replica(0), replica(1, "restarting", since=3.0, cause="rank 1 died"))
    engine = backend(status, started=b"")
    assert asked(engine, "/health")[0] == 200
    code, body = asked(engine, "/ready")
    assert code == 503
    assert body["error"]["message"] == "not all replicas are ready: replica 1: restarting for 3 s (rank 1 died)"


def test_replicas_of_other_hosts_are_not_waited_for() -> None:
    assert asked(backend(fleet(replica(0), replica(1, "awaited"))), "/ready")[0] == 200
    code, body = asked(backend(fleet(replica(0, "starting"), replica(1, "awaited")), started=b""), "/ready")
    assert code == 503
    assert "replica 0 is starting" in body["error"]["message"]
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
def test_it_says_why_not(path: str, engine: FakeBackend, why: str) -> None:
    code, body = asked(engine, path)
    assert code == 503
    assert why in body["error"]["message"]
    assert body["error"]["type"] == "server_error"


def test_a_replica_that_can_never_start_is_named() -> None:
    engine = backend(fleet(replica(0), replica(1, "failed")), EngineError("replica 1: out of memory"))
    assert asked(engine, "/health")[0] == 200
    code, body = asked(engine, "/ready")
    assert code == 503
    assert "out of memory" in body["error"]["message"]


def test_an_engine_that_does_not_answer() -> None:
    class Silent(FakeBackend):
        async def status(self) -> FleetStatus:
            await asyncio.Event().wait()
            raise AssertionError

    code, body = asked(Silent(), "/health", answer_s=0.01)
    assert code == 503
    assert body["error"]["message"] == "the fleet has not answered within 0.01 s"
