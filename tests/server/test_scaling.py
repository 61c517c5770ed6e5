"""POST /v1/admin/replicas: the errors that a wrong number of replicas gives."""

from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from shoal.errors import ClosedError, ConfigError, EngineError, Unavailable
from shoal.server.http.errors import add_handlers
from shoal.server.operations import scaling
from support.fake_backend import FakeBackend


@pytest.mark.parametrize(
    ("error", "status", "param", "after"),
    [
        (ConfigError("9 replicas need 18 devices, there are 8"), 400, "replicas", None),
        (Unavailable("the server ends", 4.0), 503, None, "4"),
        (ClosedError("the engine was closed"), 503, None, "10"),
        (EngineError("the engine does not answer"), 500, None, None),
    ],
)
def test_each_error_has_its_http_status(error: Exception, status: int, param: str | None, after: str | None) -> None:
    app = FastAPI()
    add_handlers(app)
    app.include_router(scaling.routes(FakeBackend(refusal=error)))
    answer: Any = TestClient(app).post("/v1/admin/replicas", json={"replicas": 9})
    found = answer.json()["error"]
    assert (answer.status_code, found["message"], found["param"]) == (status, str(error), param)
    assert answer.headers.get("retry-after") == after
