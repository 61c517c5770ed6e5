"""`shoal serve`: a fleet of replicas, and the servers before it; signals, draining, and the end."""

import asyncio
import signal
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import uvloop

from shoal.errors import EngineError, ShoalError
from shoal.frontend.async_llm import AsyncLLM
from shoal.frontend.model import OpenModel
from shoal.observe.logging import get_logger
from shoal.server.api_servers import ApiServers
from shoal.server.app import make_app
from shoal.server.listening import Listening, make_server
from shoal.server.metrics import RequestMetrics
from shoal.server.settings import ServerSettings

log = get_logger("serve")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_END_S = 2.0


@dataclass(slots=True)
class _Signals:
    """The first one asks for an end, the second for one at once."""

    first: asyncio.Event = field(default_factory=asyncio.Event)
    second: asyncio.Event = field(default_factory=asyncio.Event)

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._heard)

    def _heard(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def run(
    model: OpenModel,
    settings: ServerSettings,
    listening: Listening,
    *,
    api_server_count: int = 1,
    shutdown_timeout: float = 60.0,
) -> int:
    """Serves until a signal comes. Gives the exit code: 0 if every request had its end, 1 if some were cut off.

    Raises:
        ConfigError: nobody can listen there.
        UserError, EngineError: the replicas could not start.
    """
    listening.check()
    with listening.bind() as sock:
        serving = _serve(model, settings, listening, sock, api_server_count, shutdown_timeout)
        return uvloop.run(serving)


async def _serve(
    model: OpenModel,
    settings: ServerSettings,
    listening: Listening,
    sock: socket.socket,
    count: int,
    shutdown_timeout: float,
) -> int:
    signals = _Signals()
    signals.listen()
    metrics = RequestMetrics(model.decision.max_model_len)
    llm = AsyncLLM(model, recorder=metrics, verbs=metrics.verbs)
    try:
        front = (
            _Front.here(llm, settings, listening, sock)
            if count == 1
            else _Front.apart(ApiServers(llm, model, settings, listening, sock, count))
        )
        return await _until_signal(llm, front, signals, listening.url(sock), shutdown_timeout)
    finally:
        await asyncio.to_thread(llm.close)


@dataclass(slots=True)
class _Front:
    """What clients talk to. `serve` runs until `stop`."""

    serve: Callable[[], Coroutine[Any, Any, object]]
    stop: Callable[[bool], object]

    @classmethod
    def here(cls, llm: AsyncLLM, settings: ServerSettings, listening: Listening, sock: socket.socket) -> "_Front":
        server = make_server(make_app(llm, settings), settings, listening)
        return cls(lambda: server.serve(sockets=[sock]), lambda at_once: server.stop(at_once=at_once))

    @classmethod
    def apart(cls, servers: ApiServers) -> "_Front":
        return cls(servers.serve, lambda at_once: servers.stop(at_once=at_once))


async def _until_signal(llm: AsyncLLM, front: _Front, signals: _Signals, url: str, shutdown_timeout: float) -> int:
    log.info("%s listens; requests wait until replicas are ready", url)
    server = asyncio.create_task(front.serve())
    starting = asyncio.create_task(_announce(llm, url))
    asked = asyncio.create_task(signals.first.wait())
    done, _ = await asyncio.wait([server, starting, asked], return_when=asyncio.FIRST_COMPLETED)
    if starting in done and starting.exception() is None:
        done, _ = await asyncio.wait([server, asked], return_when=asyncio.FIRST_COMPLETED)
    starting.cancel()
    if asked not in done:  # a replica that can't start, or a server that ended by itself
        front.stop(True)
        failure = starting.exception() if starting.done() and not starting.cancelled() else None
        await asyncio.gather(server, return_exceptions=True)
        raise failure if isinstance(failure, ShoalError) else EngineError(f"the server has ended by itself: {failure}")
    complete = await _drain(llm, signals, shutdown_timeout)
    if not complete:  # whoever still waits is told
        await asyncio.to_thread(llm.close)
    front.stop(False)
    await asyncio.wait([server, asyncio.create_task(signals.second.wait())], return_when=asyncio.FIRST_COMPLETED)
    front.stop(True)
    await asyncio.wait([server], timeout=_END_S)
    return 0 if complete else 1


async def _announce(llm: AsyncLLM, url: str) -> None:
    await llm.ready()
    print(f"Shoal serves {llm.model_name} at {url}", flush=True)


async def _drain(llm: AsyncLLM, signals: _Signals, timeout: float) -> bool:
    """True: all requests have ended."""
    log.info("nothing new is taken; what runs has %g s (--shutdown-timeout), a second signal ends at once", timeout)
    drained = asyncio.create_task(llm.drain(timeout))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait([drained, second], return_when=asyncio.FIRST_COMPLETED)
    if drained.done() and drained.exception() is None and drained.result():
        return True
    drained.cancel()
    log.warning("requests that still run are cut off")
    return False
