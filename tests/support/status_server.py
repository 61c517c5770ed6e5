"""A server that says of itself what a test tells it to: the real routes over a made-up fleet."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType

import uvicorn
from fastapi import Body, FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse

from shoal.server.operations import status
from shoal.server.operations.dashboard import routes as dashboard
from shoal.wire.engine import EngineStats
from shoal.wire.fleet import FleetStatus, ReplicaStatus
from shoal.wire.ranks import RankStats


def ranks(tp: int = 2, pp: int = 1, *, first_pid: int = 100, busy_us: int = 0) -> tuple[RankStats, ...]:
    return tuple(
        RankStats(
            number,
            first_pid + number,
            anonymous=(number + 1) << 20,
            anonymous_at_import=0,
            kv_bytes=1 << 18,
            weight_bytes=1 << 19,
            stage=number // tp,
            busy_us=busy_us,
        )
        for number in range(tp * pp)
    )


def engine(
    *,
    running: int = 0,
    waiting: int = 0,
    free: int = 100,
    prompt: int = 0,
    generated: int = 0,
    queries: int = 0,
    hits: int = 0,
    of_ranks: Sequence[RankStats] = (),
) -> EngineStats:
    return EngineStats(
        waiting=waiting,
        running=running,
        num_blocks=100,
        free_blocks=free,
        block_size=16,
        max_model_len=256,
        steps=1,
        prompt_tokens=prompt,
        generated_tokens=generated,
        prefix_queries=queries,
        prefix_hits=hits,
        preemptions=0,
        draft_tokens=0,
        accepted_tokens=0,
        schedule_us=1,
        step_total_us=1,
        step_forward_us=1,
        ranks=tuple(of_ranks),
    )


def replica(
    number: int,
    state: str = "ready",
    *,
    host: str = "alpha",
    since: float = 1.0,
    restarts: int = 0,
    cause: str = "",
    stats: EngineStats | None = None,
) -> ReplicaStatus:
    return ReplicaStatus(number, state, host, 50 + number, since, restarts, cause, 0, stats)


def fleet(
    *replicas: ReplicaStatus,
    uptime: float = 10.0,
    tp: int = 2,
    pp: int = 1,
    queued: int = 0,
    replays: int = 0,
    accepting: bool = True,
) -> FleetStatus:
    return FleetStatus("tiny", tp, pp, replicas, queued, replays, accepting, uptime)


class StatusServer:
    """Listens on loopback, in a thread, inside `with`; `close` and `open` make it go away and come back.

    `now` is asked at each reading. `key`: what must be given; `metrics`: makes the text at /metrics. `scale` is what is
    done when replicas are asked for, and `broken` refuses to.
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

    async def status(self) -> FleetStatus:
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

        app.include_router(status.routes(self))
        app.include_router(dashboard.routes())
        return app
