"""`shoal serve`: a fleet of replicas, and the servers before it; signals, draining, and the end."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import uvloop

from shoal.activity import ActivityState
from shoal.errors import ClosedError, EngineError, ShoalError
from shoal.launch.open_model import OpenModel
from shoal.llm.async_llm import AsyncLLM
from shoal.log import get_logger
from shoal.process import garbage_collector
from shoal.server.api.response_store import ResponseStore
from shoal.server.api_servers import ApiServers
from shoal.server.app import make_app
from shoal.server.backend import Backend
from shoal.server.http.listening import LAST_BYTES_S, Listening, make_server
from shoal.server.operations.request_metrics import RequestMetrics
from shoal.server.settings import ServerSettings

log = get_logger("serve")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_END_S = 2.0
_LOOK_S = 1.0
_AT_ONCE_S = 3.0  # from the second signal on


@dataclass(slots=True)
class EndSignals:
    """The first one asks for an end, the second for one at once."""

    first: asyncio.Event = field(default_factory=asyncio.Event)
    second: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: Callable[[], object] = lambda: None  # called with the second one

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.hear)

    def hear(self) -> None:
        if not self.first.is_set():
            self.first.set()
        elif not self.second.is_set():
            self.second.set()
            self.at_once()


def _leave_soon(code: int) -> None:
    """Ends this process in a few seconds, whatever is left: work on other threads that can't be called off would
    otherwise be waited for. Replicas and API servers end with it."""

    def leave() -> None:
        time.sleep(_AT_ONCE_S)
        log.warning("the server ends with work that can't be called off")
        os._exit(code)

    threading.Thread(target=leave, daemon=True, name="shoal-leave").start()


async def _apart(work: Callable[[], None]) -> None:
    """Runs `work` on a thread of its own: those of the pool may all be at something that takes long."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            work()
        finally:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, daemon=True, name="shoal-close").start()
    await done.wait()


def run(
    model: OpenModel,
    settings: ServerSettings,
    listening: Listening,
    *,
    api_server_count: int = 1,
    shutdown_timeout: float = 60.0,
) -> int:
    """Serves until a signal comes. Gives the exit code: 0 if every request had its end and every client read it, 1 if
    some were cut off.

    Raises:
        ConfigError: nobody can listen there.
        UserError, EngineError: the replicas could not start, none is left that could come back, or the server itself
            has failed.
    """
    listening.check()
    with ExitStack() as stack:
        sockets = [stack.enter_context(sock) for sock in listening.bind()]
        serving = _serve(model, settings, listening, sockets, api_server_count, shutdown_timeout)
        return uvloop.run(serving)


async def _serve(
    model: OpenModel,
    settings: ServerSettings,
    listening: Listening,
    sockets: Sequence[socket.socket],
    count: int,
    shutdown_timeout: float,
) -> int:
    signals = EndSignals(at_once=lambda: _leave_soon(1))
    signals.listen()
    metrics = RequestMetrics(model.decision.max_model_len)
    verbs = metrics.verbs | ResponseStore.of(settings).verbs
    llm = AsyncLLM(model, recorder=metrics, verbs=verbs)
    try:
        front: Front = (
            _Here(llm, settings, listening, sockets)
            if count == 1
            else ApiServers(llm, model, settings, listening, sockets, count, metrics.note_api_restart)
        )
        code = await serve_until_end(llm, front, signals, listening.url(sockets), shutdown_timeout)
    finally:
        await _apart(llm.close)
    _leave_soon(code)
    return code


class Front(Protocol):
    """What clients talk to."""

    async def serve(self) -> bool:
        """Until `stop`. True: all clients have read their answers to the end."""

    def stop(self, patience: float) -> None:
        """Clients have so many seconds to read what is left; 0: it ends at once."""


class _Here:
    """In this process."""

    def __init__(
        self, llm: Backend, settings: ServerSettings, listening: Listening, sockets: Sequence[socket.socket]
    ) -> None:
        self._server = make_server(make_app(llm, settings), settings, listening)
        self._sockets = list(sockets)

    async def serve(self) -> bool:
        await self._server.serve(sockets=self._sockets)
        return self._server.complete

    def stop(self, patience: float) -> None:
        self._server.stop(patience)


async def serve_until_end(
    llm: Backend,
    front: Front,
    signals: EndSignals,
    url: str,
    shutdown_timeout: float,
    *,
    look_s: float = _LOOK_S,
) -> int:
    """Serve until a signal comes, drain, and return the exit code: 0 if every client got its whole answer, else 1.

    `look_s`: seconds between looks at whether any replica is left.

    Raises:
        UserError, EngineError: as `run`.
    """
    log.info("%s listens; requests wait until replicas are ready", url)
    server = asyncio.create_task(front.serve())
    watch = asyncio.create_task(_watch(llm, url, look_s))
    asked = asyncio.create_task(signals.first.wait())
    done, _ = await asyncio.wait([server, watch, asked], return_when=asyncio.FIRST_COMPLETED)
    if asked in done:
        watch.cancel()
        return await _drain(llm, front, server, signals, shutdown_timeout)
    cause = _exception_of(watch) or _exception_of(server)
    watch.cancel()
    await _apart(llm.close)  # whoever still waits is told
    await _end(front, server, signals, LAST_BYTES_S)
    raise cause if isinstance(cause, ShoalError) else EngineError(f"the server has ended by itself: {cause!r}")


async def _watch(llm: Backend, url: str, look_s: float) -> None:
    """
    Raises:
        UserError, EngineError: nothing can be served: a replica can't start, none is left that could come back, or the
            thread that drives them has ended.
    """
    await llm.ready()
    garbage_collector.settle()
    print(f"Shoal serves {llm.model_name} at {url}", flush=True)
    while True:
        await asyncio.sleep(look_s)
        try:
            status = await llm.status()
        except ClosedError:
            raise
        except EngineError as error:  # it may be busy
            log.warning("%s", error)
            continue
        if status.failure:
            raise EngineError(status.failure)


async def _drain(
    llm: Backend, front: Front, server: "asyncio.Task[bool]", signals: EndSignals, shutdown_timeout: float
) -> int:
    log.info(
        "nothing new is taken; what runs has %g s (--shutdown-timeout), a second signal ends at once", shutdown_timeout
    )
    deadline = time.monotonic() + shutdown_timeout
    await _say_what_holds(llm)
    complete = await _requests_end(llm, signals, shutdown_timeout)
    if not complete:
        log.warning("requests that still run are cut off")
        await _apart(llm.close)  # whoever still waits is told
    read = await _end(front, server, signals, max(LAST_BYTES_S, deadline - time.monotonic()))
    return 0 if complete and read else 1


async def _say_what_holds(llm: Backend) -> None:
    """Requests of a server that is paused end no sooner than it goes on, which it may be asked for while it drains."""
    try:
        status = await llm.status()
    except EngineError:  # it may be busy, or have failed; the drain says so
        return
    unfinished = status.queued + sum(replica.held for replica in status.replicas)
    if unfinished and status.activity != ActivityState.AWAKE:
        way_out = "/resume" if status.activity == ActivityState.PAUSED else "/wake_up"
        log.warning(
            "it is %s: %d requests stand still until POST %s, or are cut off", status.activity, unfinished, way_out
        )


async def _requests_end(llm: Backend, signals: EndSignals, timeout: float) -> bool:
    """True: all of them have ended."""
    drained = asyncio.create_task(llm.drain(timeout))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait([drained, second], timeout=timeout + _END_S, return_when=asyncio.FIRST_COMPLETED)
    drained.cancel()
    second.cancel()
    error = _exception_of(drained)
    if error is not None:
        log.error("requests could not end: %s", error)
    return drained.done() and not drained.cancelled() and error is None and drained.result()


async def _end(front: Front, server: "asyncio.Task[bool]", signals: EndSignals, patience: float) -> bool:
    """True: every client has read its answer to the end."""
    front.stop(0.0 if signals.second.is_set() else patience)
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait([server, second], timeout=patience + _END_S, return_when=asyncio.FIRST_COMPLETED)
    second.cancel()
    if not server.done():
        front.stop(0.0)
        await asyncio.wait([server], timeout=_END_S)
    error = _exception_of(server)
    if error is not None:
        log.error("the server has ended by itself: %s", error)
        return False
    complete = server.done() and not server.cancelled() and server.result()
    if not complete:
        log.warning("clients that still read are cut off")
    return complete


def _exception_of(task: "asyncio.Task[Any]") -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None
