"""A server with the real routes for status and scaling, over a made-up fleet."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from types import TracebackType

import uvicorn
from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse

from shoal.server.operations import status
from shoal.server.operations.dashboard import routes as dashboard
from shoal.wire.fleet import FleetStatus
from support.fake_backend import FakeBackend


class StatusServer:
    """A server that listens on loopback, on a thread, inside `with`. `close` and `open` make it go away and come back.

    `now` returns the status for each reading. `key`: the API key that is needed. `metrics` makes the text at /metrics.
    `scale` is called when a number of replicas is requested, unless `broken` is true; then the request is refused.
    """

    def __init__(self, now: Callable[[], FleetStatus]) -> None:
        self.now = now
        self.key = ""
        self.metrics: Callable[[], str] = lambda: ""
        self.scale: Callable[[int], None] = lambda count: None
        self.asked: list[str] = []
        self.broken = False
        self._port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _fleet(self) -> FleetStatus:
        return self.now()

    def open(self) -> None:
        listening = socket.create_server(("127.0.0.1", self._port), reuse_port=False)
        self._port = listening.getsockname()[1]
        config = uvicorn.Config(self._app(), log_level="warning", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, args=(self._server, listening), daemon=True)
        self._thread.start()

    @staticmethod
    def _serve(server: uvicorn.Server, listening: socket.socket) -> None:
        asyncio.run(server.serve(sockets=[listening]))
        listening.close()

    def close(self) -> None:
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._server = None

    def __enter__(self) -> "StatusServer":
        self.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def check(request: Request, following: Callable[[Request], Awaitable[Response]]) -> Response:
            self.asked.append(request.url.path)
            wanted = f"Bearer {self.key}" if self.key else ""
            if wanted and request.url.path != "/dashboard" and request.headers.get("Authorization") != wanted:
                return Response('{"error": {"message": "wrong API key"}}', 401)
            return await following(request)

        @app.get("/metrics")
        async def metrics() -> PlainTextResponse:
            return PlainTextResponse(self.metrics())

        @app.post("/v1/admin/replicas")
        async def scale(replicas: int = Body(embed=True)) -> dict[str, int]:
            if self.broken:
                raise HTTPException(400, "replicas that share experts can't be added or removed")
            self.scale(replicas)
            return {"replicas": replicas}

        app.include_router(status.routes(FakeBackend(status=self._fleet)))
        app.include_router(dashboard.routes())
        return app
