"""The FastAPI application: all endpoints and their middleware."""

from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from shoal import __version__
from shoal.server.api import chat, completions, models, tokenization
from shoal.server.api.responses import create_response, stored_responses
from shoal.server.api.service import Service, client_disconnected
from shoal.server.backend import Backend
from shoal.server.http.errors import add_handlers
from shoal.server.http.event_streams import ClientDisconnected
from shoal.server.http.limits import add_limits
from shoal.server.http.methods import CommonMethods
from shoal.server.http.request_ids import RequestIds
from shoal.server.operations import comm_costs, health, pause_and_sleep, profiling, scaling, status
from shoal.server.operations.dashboard import routes as dashboard
from shoal.server.operations.metrics_page import add_metrics
from shoal.server.settings import ServerSettings


def make_app(llm: Backend, settings: ServerSettings) -> FastAPI:
    """Return an application with all endpoints of `shoal serve`. It neither starts nor closes the model."""
    app = openai_app(llm, settings)
    for endpoints in (health, status, comm_costs, scaling, pause_and_sleep, profiling):
        app.include_router(endpoints.routes(llm))
    app.include_router(dashboard.routes())
    add_limits(app, settings)
    add_metrics(app, llm, Service(llm, settings).names[0])
    _make_ready(app)
    return app


def _make_ready(app: FastAPI) -> None:
    """Prepare routes and description now: FastAPI would do that during the first requests, and delay others."""
    nowhere = {"type": "http", "path": "", "root_path": "", "method": "GET", "headers": [], "query_string": b""}
    for route in app.routes:
        route.matches(nowhere)
    if app.openapi_url is not None:
        app.openapi()


class _App(FastAPI):
    """A FastAPI whose description leaves out status 422, since wrong bodies and parameters are answered with 400.

    Request ids are the outermost middleware, so that answers to unexpected errors have them too.
    """

    def build_middleware_stack(self) -> ASGIApp:
        return RequestIds(super().build_middleware_stack())

    def openapi(self) -> dict[str, Any]:
        found = super().openapi()
        for path in found["paths"].values():
            for operation in path.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        for unused in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(unused, None)
        return found


def openai_app(llm: Backend, settings: ServerSettings) -> FastAPI:
    """Return an application with the endpoints of OpenAI's API alone."""
    documented: dict[str, Any] = {"docs_url": None, "redoc_url": None} if settings.disable_docs else {}
    app = _App(
        title="Shoal",
        version=__version__,
        openapi_url=None if settings.disable_docs else "/openapi.json",
        **documented,
    )
    add_handlers(app)
    app.add_middleware(CommonMethods)
    app.add_exception_handler(ClientDisconnected, client_disconnected)
    service = Service(llm, settings)
    for endpoints in (completions, chat, create_response, stored_responses, models, tokenization):
        app.include_router(endpoints.routes(service))
    return app
