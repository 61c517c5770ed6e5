"""POST /start_profile and /stop_profile."""

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from shoal.errors import ConfigError
from shoal.server.http.errors import add_handlers
from shoal.server.operations import profiling
from shoal.wire.base import encode
from shoal.wire.trace import TraceSummary
from support.fake_backend import FakeBackend


def client(**verbs: Any) -> TestClient:
    backend = FakeBackend()
    backend.verbs.update(verbs)
    app = FastAPI()
    add_handlers(app)
    app.include_router(profiling.routes(backend))
    return TestClient(app)


@pytest.mark.parametrize(("note", "shown"), [("", None), ("it is full", "it is full")])
def test_the_answer_says_where_the_trace_is(note: str, shown: str | None) -> None:
    asked = client(
        start_profile=lambda _: b"", stop_profile=lambda _: encode(TraceSummary("/tmp/run.json.gz", 12, note))
    )
    assert asked.post("/start_profile").json() == {"status": "recording"}
    assert asked.post("/stop_profile").json() == {
        "status": "written",
        "file": "/tmp/run.json.gz",
        "events": 12,
        "note": shown,
    }


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile"])
def test_a_refusal_is_a_conflict(path: str) -> None:
    def refuse(_: bytes) -> bytes:
        raise ConfigError("no trace is recorded")

    found: Any = client(start_profile=refuse, stop_profile=refuse).post(path)
    assert found.status_code == 409
    assert found.json()["error"]["message"] == "no trace is recorded"
