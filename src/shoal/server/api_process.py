"""One of several API servers: `python -m shoal.server.api_process --fd N --parent PID`."""

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

from shoal import wire
from shoal.cluster.desk import Answer, Questions
from shoal.errors import ClosedError
from shoal.frontend.async_llm import AsyncLLM
from shoal.frontend.model import OpenModel, open_model
from shoal.observe import logging
from shoal.server.app import make_app
from shoal.server.listening import Listening, Server, make_server
from shoal.server.settings import ServerSettings
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import die_with_parent

_SETUP_S = 60.0
_SLICE_S = 0.2


class ChannelLine:
    """A line to the fleet of another process. A thread reads what it says."""

    def __init__(self, channel: Channel, deliver: Callable[[Answer], object], ended: Callable[[], object]) -> None:
        """`ended` is called when the other process says so, or has gone."""
        self._channel = channel
        self._deliver = deliver
        self._ended = ended
        self._questions = Questions()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name="shoal-line", daemon=True)
        self._thread.start()

    def send(self, messages: Sequence[wire.EngineRequest | wire.Abort]) -> None:
        try:
            for message in messages:
                self._channel.send(wire.encode(message))
        except ChannelClosed:
            raise ClosedError("the engine was closed") from None

    def ask(self, verb: str, payload: bytes = b"") -> "Future[bytes]":
        question, future = self._questions.add(verb, payload)
        try:
            self._channel.send(wire.encode(question))
        except ChannelClosed:
            self._questions.fail("the engine was closed")
        return future

    def close(self) -> None:
        self._closed = True

    def _read(self) -> None:
        try:
            while not self._closed:
                if not wait([self._channel], _SLICE_S):
                    continue
                for frame in self._channel.receive():
                    match wire.to_api.decode(frame):
                        case wire.Told() as told:
                            self._questions.answer(told)
                        case wire.Updates() as updates:
                            self._deliver(updates)
                        case wire.Stop():
                            self._ended()
        except ChannelClosed:
            pass
        finally:
            self._questions.fail("the engine was closed")
            self._ended()


def main(arguments: Sequence[str]) -> int:
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    die_with_parent(int(options["--parent"]))
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the parent decides what ends
        signal.signal(number, signal.SIG_IGN)
    channel = Channel.from_fd(int(options["--fd"]))
    setup = _setup(channel)
    logging.configure(f"(API server {setup.number}) ")
    model = open_model(setup.model, setup.options, online=True)
    settings = ServerSettings(**{name: _plain(value) for name, value in setup.settings.items()})
    uvloop.run(_serve(channel, setup, model, settings))
    return 0


def _setup(channel: Channel) -> wire.ApiSetup:
    if not wait([channel], _SETUP_S) or not (frames := channel.receive(1)):
        sys.exit("nobody says what to serve")
    setup = wire.to_api.decode(frames[0])
    assert isinstance(setup, wire.ApiSetup)
    return setup


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


async def _serve(channel: Channel, setup: wire.ApiSetup, model: OpenModel, settings: ServerSettings) -> None:
    servers: list[Server] = []
    stopped = threading.Event()

    def end() -> None:
        stopped.set()
        for server in servers:
            server.stop()

    llm = AsyncLLM(model, line=lambda deliver: ChannelLine(channel, deliver, end))
    listening = Listening(**setup.listening)
    server = make_server(make_app(llm, settings), settings, listening)
    servers.append(server)
    if not stopped.is_set():
        await server.serve(sockets=[socket.socket(fileno=os.dup(setup.socket))])
    with contextlib.suppress(Exception):
        llm.close()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    os._exit(code)
