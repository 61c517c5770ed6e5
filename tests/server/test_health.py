"""/health, /ready and /version: honest, and with the cause."""

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI

from shoal import __version__
from shoal.errors import ClosedError, EngineError
from shoal.server.http.errors import add_handlers
from shoal.server.operations import health
from shoal.wire.base import replace_fields
from shoal.wire.fleet import FleetStatus
from support.asgi import get
from support.status_server import fleet, replica


class FakeEngine:
    def __init__(self, status: FleetStatus | Exception, started: bool | Exception = True) -> None:
        self._status = status
        self._started = started

    async def status(self) -> FleetStatus:
        if isinstance(self._status, Exception):
            raise self._status
        return self._status

    async def ask(self, verb: str, payload: bytes = b"") -> bytes:
        assert verb == "started"
        if isinstance(self._started, Exception):
            raise self._started
        return b"yes" if self._started else b""


def asked(engine: FakeEngine, path: str) -> tuple[int, Any]:
    app = FastAPI()
    add_handlers(app)
    app.include_router(health.routes(engine))
    status, body = asyncio.run(get(app, path))
    return status, json.loads(body)


def test_the_version() -> None:
    assert asked(FakeEngine(ClosedError("gone")), "/version") == (200, {"version": __version__})


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_all_is_well(path: str) -> None:
    assert asked(FakeEngine(fleet(replica(0), replica(1))), path)[0] == 200


def test_with_one_of_two_it_serves_but_is_not_all_there() -> None:
    status = fleet(replica(0), replica(1, "restarting", since=3.0, cause="rank 1 died"))
    engine = FakeEngine(status, started=False)
    assert asked(engine, "/health")[0] == 200
    code, body = asked(engine, "/ready")
    assert code == 503
    assert body["error"]["message"] == "not all replicas are ready: replica 1 is restarting for 3 s (rank 1 died)"


def test_replicas_of_other_hosts_are_not_waited_for() -> None:
    assert asked(FakeEngine(fleet(replica(0), replica(1, "awaited"))), "/ready")[0] == 200
    code, body = asked(FakeEngine(fleet(replica(0, "starting"), replica(1, "awaited")), started=False), "/ready")
    assert code == 503
    assert "replica 0 is starting" in body["error"]["message"]
    assert "replica 1" not in body["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize(
    ("engine", "why"),
    [
        (FakeEngine(fleet(replica(0), accepting=False)), "about to end"),
        (
            FakeEngine(
                replace_fields(fleet(replica(0, "failed"), accepting=False), failure="no replica is left: it died")
            ),
            "no replica is left: it died",
        ),
        (FakeEngine(fleet(replica(0, "starting")), started=False), "replica 0 is starting for 1 s"),
        (FakeEngine(fleet(), started=False), "there is none"),
        (FakeEngine(fleet(*(replica(number, "failed") for number in range(50))), started=False), "; 42 more"),
        (FakeEngine(ClosedError("the engine was closed")), "the engine was closed"),
    ],
)
def test_it_says_why_not(path: str, engine: FakeEngine, why: str) -> None:
    code, body = asked(engine, path)
    assert code == 503
    assert why in body["error"]["message"]
    assert body["error"]["type"] == "server_error"


def test_a_replica_that_can_never_start_is_named() -> None:
    engine = FakeEngine(fleet(replica(0), replica(1, "failed")), EngineError("replica 1: out of memory"))
    assert asked(engine, "/health")[0] == 200
    code, body = asked(engine, "/ready")
    assert code == 503
    assert "out of memory" in body["error"]["message"]


def test_an_engine_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FakeEngine):
        async def status(self) -> FleetStatus:
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr(health, "_ANSWER_S", 0.01)
    code, body = asked(Silent(fleet()), "/health")
    assert code == 503
    assert "has not answered within" in body["error"]["message"]
