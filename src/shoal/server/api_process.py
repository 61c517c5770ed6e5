"""One of several API servers: `python -m shoal.server.api_process --fd N --parent PID`."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import uvloop

from shoal.cluster.fleet_connections import FleetMessage, PendingCalls
from shoal.errors import ClosedError, ShoalError
from shoal.launch.open_model import OpenModel, open_served_model
from shoal.llm.async_llm import AsyncLLM
from shoal.log import configure_logging, get_logger
from shoal.process import garbage_collector
from shoal.server.app import make_app
from shoal.server.http.listening import Listening, Server, make_server
from shoal.server.settings import ServerSettings
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import die_with_parent
from shoal.transport.waker import Waker
from shoal.wire.base import Stop, encode
from shoal.wire.engine import Abort, ControlCall, ControlReply, EngineRequest, Updates
from shoal.wire.fleet import ContextLength, to_api
from shoal.wire.plan import ApiSetup

_SETUP_S = 60.0
SLICE_S = 1.0  # how often a line looks whether it was closed, at least

log = get_logger("serve")


class ChannelLine:
    """A connection to the fleet of another process. A thread reads its messages."""

    def __init__(
        self, channel: Channel, deliver: Callable[[FleetMessage], object], ended: Callable[[], object]
    ) -> None:
        """Connect. `ended` is called when the other process ends this one, or is gone."""
        self._channel = channel
        self._deliver = deliver
        self._ended = ended
        self._calls = PendingCalls()
        self._closed = False
        self._waker = Waker()
        self._thread = threading.Thread(target=self._read, name="shoal-line", daemon=True)
        self._thread.start()

    def send(self, messages: Sequence[EngineRequest | Abort]) -> None:
        try:
            for message in messages:
                self._send(message)
        except ChannelClosed:
            raise ClosedError("the engine was closed") from None

    def ask(self, verb: str, payload: bytes = b"") -> "Future[bytes]":
        call, future = self._calls.add(verb, payload)
        try:
            self._send(call)
        except ChannelClosed:
            self._calls.fail("the engine was closed")
        return future

    def close(self) -> None:
        self._closed = True
        self._waker.wake()

    def _send(self, message: EngineRequest | Abort | ControlCall) -> None:
        self._channel.send(encode(message))
        if self._channel.backlog:  # the thread writes the rest, and does not know of it while it waits
            self._waker.wake()

    def _read(self) -> None:
        sources: list[Any] = [self._channel, self._waker]
        try:
            while not self._closed:
                readable = wait(sources, SLICE_S)
                self._waker.clear()
                if self._channel not in readable:
                    continue
                for frame in self._channel.receive():
                    match to_api.decode(frame):
                        case ControlReply() as reply:
                            self._calls.answer(reply)
                        case Updates() | ContextLength() as message:
                            self._deliver(message)
                        case Stop():
                            self._ended()
        except ChannelClosed:
            pass
        finally:
            self._calls.fail("the engine was closed")
            self._ended()
            self._waker.close()


def main(arguments: Sequence[str]) -> int:
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    die_with_parent(int(options["--parent"]))
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the parent decides what ends
        signal.signal(number, signal.SIG_IGN)
    channel = Channel.from_fd(int(options["--fd"]))
    setup = _setup(channel)
    configure_logging(f"(API server {setup.number}) ")
    try:
        model = open_served_model(setup.model, setup.options, setup.served)
    except ShoalError as error:
        log.error("%s", error)
        return 1
    settings = ServerSettings(**{name: _plain(value) for name, value in setup.settings.items()})
    return 0 if uvloop.run(_serve(channel, setup, model, settings)) else 1


def _setup(channel: Channel) -> ApiSetup:
    if not wait([channel], _SETUP_S) or not (frames := channel.receive(1)):
        sys.exit("this process got no setup: it is started by `shoal serve`")
    setup = to_api.decode(frames[0])
    assert isinstance(setup, ApiSetup)
    return setup


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


async def _serve(channel: Channel, setup: ApiSetup, model: OpenModel, settings: ServerSettings) -> bool:
    """Return True if every client has read its answer to the end."""
    servers: list[Server] = []
    stopped = threading.Event()

    def end() -> None:
        stopped.set()
        for server in servers:
            server.stop(None)  # the parent has the clock

    llm = AsyncLLM(model, connect=lambda deliver: ChannelLine(channel, deliver, end))
    listening = Listening(**setup.listening)
    server = make_server(make_app(llm, settings), settings, listening)
    servers.append(server)
    settling = asyncio.create_task(_settle(llm))
    if not stopped.is_set():
        await server.serve(sockets=[socket.socket(fileno=os.dup(fd)) for fd in setup.sockets])
    settling.cancel()
    with contextlib.suppress(Exception):
        llm.close()
    return server.complete


async def _settle(llm: AsyncLLM) -> None:
    """Leave what this process has after its start out of later garbage collections."""
    with contextlib.suppress(ShoalError):  # the fleet has failed
        await llm.ready()
        garbage_collector.freeze()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)
