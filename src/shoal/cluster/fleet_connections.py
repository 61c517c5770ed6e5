"""Connections between a fleet and its clients, in this process and in others.

Clients number their requests from 0. In the fleet each connection has a range of numbers, which begins at its `base`:
the base is added to the numbers in a client's messages, and it is written on the envelope of the updates for a client.
"""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from shoal.errors import ClosedError, EngineError, UserError
from shoal.transport.channel import Channel, ChannelClosed
from shoal.wire.base import WireError, encode
from shoal.wire.engine import Abort, ControlCall, ControlReply, EngineRequest, SeqUpdate, Updates
from shoal.wire.fleet import ContextLength

_CLIENT_BITS = 40  # the low bits of a request's number are the client's own number; the high bits number the connection
_LAST_MESSAGES_S = 1.0  # how long a client in another process has to read its last messages

FleetMessage = Updates | ContextLength | ControlReply
"""A message of a fleet to a client."""


class FleetConnection(Protocol):
    """A client's end of its connection to a fleet. All methods may be called from any thread."""

    def send(self, messages: Sequence[EngineRequest | Abort]) -> None:
        """Send messages to the fleet. Never blocks.

        Raises:
            ClosedError: the fleet was closed or has failed.
        """

    def ask(self, verb: str, payload: bytes = b"") -> "Future[bytes]":
        """Ask for something that is not a request, and return its future answer.

        The exception of the future is a UserError or an EngineError.
        """

    def close(self) -> None:
        """End the connection and all its requests. Idempotent."""


class PendingCalls:
    """The control calls of a client that are not answered yet. A part of implementations of `FleetConnection`."""

    def __init__(self) -> None:
        self._ids = itertools.count()
        self._futures: dict[int, Future[bytes]] = {}

    def add(self, verb: str, payload: bytes) -> tuple[ControlCall, "Future[bytes]"]:
        """Return a new call, which the caller must send, and its future answer."""
        number = next(self._ids)
        future: Future[bytes] = Future()
        self._futures[number] = future
        return ControlCall(number, verb, payload), future

    def answer(self, reply: ControlReply) -> None:
        """Give a call its answer, if a client still waits for it."""
        future = self._futures.pop(reply.id, None)
        if future is None or not future.set_running_or_notify_cancel():
            return
        if reply.error:
            future.set_exception(UserError(reply.error) if reply.user_error else EngineError(reply.error))
        else:
            future.set_result(reply.payload)

    def fail(self, why: str) -> None:
        """End all calls with a ClosedError: no answers will come any more."""
        for number in list(self._futures):
            future = self._futures.pop(number, None)
            if future is not None and future.set_running_or_notify_cancel():
                future.set_exception(ClosedError(why))


class Client:
    """A fleet's end of a connection. `send` hands a message over without blocking; `end` is called last."""

    def __init__(self, number: int, send: Callable[[FleetMessage], object], end: Callable[[], object]) -> None:
        self.number = number
        self.base = number << _CLIENT_BITS
        self.send = send
        self.end = end
        self.requests: set[int] = set()  # by their numbers in the fleet

    def number_in_fleet(self, seq: int) -> int:
        """Return the number in the fleet of the request or group that this client has numbered `seq`.

        Raises:
            WireError: a client cannot have such a number.
        """
        if not 0 <= seq < 1 << _CLIENT_BITS:
            raise WireError(f"a client numbered a request {seq}")
        return self.base + seq

    def send_updates(self, *updates: SeqUpdate) -> None:
        """Send updates, which have the fleet's numbers."""
        self.send(Updates(updates, self.base))


def client_of(seq: int) -> int:
    """Return the number of the client of a request."""
    return seq >> _CLIENT_BITS


class RemoteClient(Client):
    """A client in another process, at the other end of a channel.

    While it does not read, its updates are collected here. They are sent together when it has read what came before.
    """

    def __init__(self, number: int, channel: Channel, unread_s: float) -> None:
        super().__init__(number, self._send, self._end)
        self.channel = channel
        self.received: deque[bytes] = deque()  # frames that are not handled yet
        self._unsent: list[SeqUpdate] = []
        self._unread_since: float | None = None
        self._unread_s = unread_s

    def _send(self, message: FleetMessage) -> None:
        if isinstance(message, Updates):
            self._unsent += message.updates
        with contextlib.suppress(ChannelClosed):  # `receive` raises it again
            if not isinstance(message, Updates):
                self.channel.send(encode(message))
            self.flush()

    def flush(self) -> None:
        """Send the collected updates if the client has read what came before.

        Raises:
            ChannelClosed: the client has not read for `unread_s` seconds, or has gone.
        """
        if not self.channel.backlog:
            self._unread_since = None
            if self._unsent:
                updates, self._unsent = self._unsent, []
                self.channel.send(encode(Updates(tuple(updates), self.base)))
        elif self._unread_since is None:
            self._unread_since = time.monotonic()
        elif time.monotonic() - self._unread_since > self._unread_s:
            raise ChannelClosed(f"it has not read for {self._unread_s:g} s")

    def receive(self) -> None:
        """Receive frames, unless there are some that are not handled yet.

        Raises:
            ChannelClosed: the client has gone.
        """
        if not self.received:
            self.received.extend(self.channel.receive())

    def _end(self) -> None:
        deadline = time.monotonic() + _LAST_MESSAGES_S
        while (self._unsent or self.channel.backlog) and (left := deadline - time.monotonic()) > 0:
            self.channel.flush(left)
            self.flush()
        self.channel.close()
