"""`shoal serve`: starts the fleet and the HTTP servers, handles signals, drains, and ends everything."""

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
from shoal.launch.early_failure import told_to_other_hosts
from shoal.launch.open_model import OpenModel
from shoal.log import get_logger
from shoal.process import garbage_collector
from shoal.server.api_servers import ApiServers
from shoal.server.app import make_app
from shoal.server.backend import Backend
from shoal.server.http.listening import LAST_BYTES_S, Listening, make_server
from shoal.server.operations.ray_export import export_to_ray
from shoal.server.operations.request_metrics import RequestMetrics
from shoal.server.settings import ServerSettings
from shoal.server.start_llm import start_llm

log = get_logger("serve")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_END_S = 2.0  # beyond a deadline, so that a process that keeps it can report that
_LOOK_S = 1.0  # how often the fleet is checked
_AT_ONCE_S = 3.0  # from the second signal to the end of the process, at most


@dataclass(slots=True)
class EndSignals:
    """SIGTERM and SIGINT as events. The first signal asks to drain, the second to exit at once."""

    first: asyncio.Event = field(default_factory=asyncio.Event)
    second: asyncio.Event = field(default_factory=asyncio.Event)
    at_once: Callable[[], object] = lambda: None  # called at the second signal

    def listen(self) -> None:
        """Handle the signals of this process from now on."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self.hear)

    def hear(self) -> None:
        """Note a signal."""
        if not self.first.is_set():
            self.first.set()
        elif not self.second.is_set():
            self.second.set()
            self.at_once()


def _leave_soon(code: int) -> None:
    """End this process in a few seconds, even if other threads have work that can't be cancelled.

    Replicas and API servers end with it.
    """

    def leave() -> None:
        time.sleep(_AT_ONCE_S)
        log.warning("exiting although a thread is still busy")
        os._exit(code)

    threading.Thread(target=leave, daemon=True, name="shoal-leave").start()


async def _apart(work: Callable[[], None]) -> None:
    """Run `work` on a new thread: all threads of the pool may be busy for long."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            work()
        finally:
            with suppress(RuntimeError):  # the loop was closed, so no task waits any more
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
    """Serve until a signal arrives. Return the exit code: 0 if every client got its whole answer, 1 if some were cut
    off.

    Raises:
        ConfigError: this host can't listen at that address.
        UserError, EngineError: the replicas could not start, none is left that could restart, or the HTTP server has
            failed.
    """
    with ExitStack() as stack:
        with told_to_other_hosts(model.given):
            listening.check()
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
    metrics = RequestMetrics(model.served.max_model_len)
    llm = start_llm(model, settings, metrics)
    exporting = asyncio.create_task(export_to_ray(llm, settings.name_of(model)))
    try:
        front: Front = (
            _OwnServer(llm, settings, listening, sockets)
            if count == 1
            else ApiServers(llm, model, settings, listening, sockets, count, metrics.note_api_restart)
        )
        code = await serve_until_end(llm, front, signals, listening.url(sockets), shutdown_timeout)
    finally:
        exporting.cancel()
        await _apart(llm.close)
    _leave_soon(code)
    return code


class Front(Protocol):
    """The HTTP server, in this process or in processes of its own."""

    async def serve(self) -> bool:
        """Serve until `stop`. Return True if all clients have read their answers to the end."""

    def stop(self, patience: float) -> None:
        """End `serve`. Clients have `patience` seconds to read what is left; 0 ends it at once."""


class _OwnServer:
    """The HTTP server in this process."""

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
    log.info("listening at %s; requests wait until replicas are ready", url)
    server = asyncio.create_task(front.serve())
    watch = asyncio.create_task(_watch(llm, url, look_s))
    asked = asyncio.create_task(signals.first.wait())
    done, _ = await asyncio.wait([server, watch, asked], return_when=asyncio.FIRST_COMPLETED)
    if asked in done:
        watch.cancel()
        return await _drain(llm, front, server, signals, shutdown_timeout)
    cause = _exception_of(watch) or _exception_of(server)
    watch.cancel()
    await _apart(llm.close)  # gives clients that still wait an error
    await _end(front, server, signals, LAST_BYTES_S)
    raise cause if isinstance(cause, ShoalError) else EngineError(f"the HTTP server ended unexpectedly: {cause!r}")


async def _watch(llm: Backend, url: str, look_s: float) -> None:
    """Print the URL once the replicas are ready, then check the fleet periodically without an end.

    Raises:
        UserError, EngineError: nothing can be served: a replica can't start, none is left that could restart, or the
            thread that drives them has ended.
    """
    await llm.ready()
    garbage_collector.freeze()
    print(f"Shoal serves {llm.model_name} at {url}", flush=True)
    while True:
        await asyncio.sleep(look_s)
        try:
            status = await llm.status()
        except ClosedError:
            raise
        except EngineError as error:  # it may be busy: ask again
            log.warning("%s", error)
            continue
        if status.failure:
            raise EngineError(status.failure)


async def _drain(
    llm: Backend, front: Front, server: "asyncio.Task[bool]", signals: EndSignals, shutdown_timeout: float
) -> int:
    log.info(
        "draining for up to %g s (--shutdown-timeout): no new requests; signal again to exit at once", shutdown_timeout
    )
    deadline = time.monotonic() + shutdown_timeout
    await _warn_if_paused(llm)
    complete = await _requests_end(llm, signals, shutdown_timeout)
    if not complete:
        log.warning("unfinished requests are cut off")
        await _apart(llm.close)  # gives clients that still wait an error
    read = await _end(front, server, signals, max(LAST_BYTES_S, deadline - time.monotonic()))
    return 0 if complete and read else 1


async def _warn_if_paused(llm: Backend) -> None:
    """Warn if the server is paused or asleep: its requests can end only if it is resumed during the drain."""
    try:
        status = await llm.status()
    except EngineError:  # it may be busy or have failed: the drain will show it
        return
    unfinished = status.queued + sum(replica.held for replica in status.replicas)
    if unfinished and status.activity != ActivityState.AWAKE:
        way_out = "/resume" if status.activity == ActivityState.PAUSED else "/wake_up"
        log.warning(
            "the server is %s: its %d unfinished requests will be cut off, unless POST %s lets them finish",
            status.activity,
            unfinished,
            way_out,
        )


async def _requests_end(llm: Backend, signals: EndSignals, timeout: float) -> bool:
    """Wait until all requests have ended, `timeout` is over or a second signal comes. Return True if all have ended."""
    drained = asyncio.create_task(llm.drain(timeout))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait([drained, second], timeout=timeout + _END_S, return_when=asyncio.FIRST_COMPLETED)
    drained.cancel()
    second.cancel()
    error = _exception_of(drained)
    if error is not None:
        log.error("draining failed: %s", error)
    return drained.done() and not drained.cancelled() and error is None and drained.result()


async def _end(front: Front, server: "asyncio.Task[bool]", signals: EndSignals, patience: float) -> bool:
    """End the HTTP server. Return True if every client has read its answer to the end."""
    front.stop(0.0 if signals.second.is_set() else patience)
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait([server, second], timeout=patience + _END_S, return_when=asyncio.FIRST_COMPLETED)
    second.cancel()
    if not server.done():
        front.stop(0.0)
        await asyncio.wait([server], timeout=_END_S)
    error = _exception_of(server)
    if error is not None:
        log.error("the HTTP server ended unexpectedly: %s", error)
        return False
    complete = server.done() and not server.cancelled() and server.result()
    if not complete:
        log.warning("clients that have not read their whole answer are cut off")
    return complete


def _exception_of(task: "asyncio.Task[Any]") -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None
