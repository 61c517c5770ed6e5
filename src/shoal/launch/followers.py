"""The followers of a process that leads: processes of the same program, which get the results of its calls."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TypeVar

from shoal.errors import ConfigError
from shoal.launch.shared_calls import Call, answer, describe_error
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed
from shoal.transport.rendezvous import describe_difference
from shoal.wire.base import Wire, encode
from shoal.wire.calls import CallAnswer, EngineReady, LeaderFailed
from shoal.wire.engine import EngineStats
from shoal.wire.rendezvous import Hello, JoinRefused

log = get_logger("followers")

T = TypeVar("T")
_REPORT_S = 10.0  # how often the log says which followers are missing
_SEND_S = 60.0  # how long a follower may take to read an answer; it always reads, unless it is stopped


class Followers:
    """The followers of this process, which leads: `SharedCalls`, and the door through which they come.

    The thread of the rendezvous calls `objection` and `enter`.
    """

    def __init__(self, size: int, agreement: Mapping[str, str]) -> None:
        """Have no followers yet.

        Args:
            size: the number of processes, with this one.
            agreement: what they must have in common with this process.
        """
        self._size = size
        self._agreement = agreement
        self._name = f"rank 0 ({socket.gethostname()}, process {os.getpid()})"
        self._channels: dict[int, Channel] = {}
        self._changed = threading.Condition()
        self._number = 0
        self._close: list[Callable[[], object]] = []

    # --- the door ------------------------------------------------------------------------------------------------

    def objection(self, hello: Hello) -> JoinRefused | None:
        if hello.size != self._size or not 0 < hello.rank < self._size:
            return JoinRefused(f"{self._name} has no follower {hello.rank} of {hello.size}, but 1 to {self._size - 1}")
        if hello.rank in self._channels:
            return JoinRefused(f"rank {hello.rank} is here already: give every process a rank of its own")
        # A follower that runs a node has none here: the pool of nodes compares it, and tells all if it differs.
        why = describe_difference(hello.agreement, self._agreement, self._name) if hello.agreement else ""
        return JoinRefused(why) if why else None

    def enter(self, hello: Hello, channel: Channel) -> None:
        with self._changed:
            self._channels[hello.rank] = channel
            self._changed.notify_all()

    # --- what the process that leads does ------------------------------------------------------------------------

    def await_all(self, timeout: float) -> None:
        """Wait until all followers are here.

        Raises:
            ConfigError: not all have come within `timeout` seconds.
        """
        begun = time.monotonic()
        with self._changed:
            while missing := [rank for rank in range(1, self._size) if rank not in self._channels]:
                waited = time.monotonic() - begun
                names = ", ".join(map(str, missing))
                if waited > timeout:
                    raise ConfigError(
                        f"rank {names} of {self._size} has not come within {timeout:g} s: every process of the program "
                        "must make the same LLM"
                    )
                if not self._changed.wait(min(_REPORT_S, timeout - waited + 0.01)):
                    log.info("waiting for rank %s of %d, %.0f s of %g", names, self._size, waited, timeout)

    def tell_ready(self, stats: EngineStats) -> None:
        """Tell the followers that the engine is ready."""
        self._send(EngineReady(stats))

    def make(self, call: Call, run: Callable[[], T]) -> T:
        self._number = number = self._number + 1
        try:
            result = run()
        except BaseException as error:
            self._send(CallAnswer(number, str(call), call.digest, error=describe_error(error)))
            raise
        self._send(answer(number, call, result))
        return result

    def _send(self, message: Wire) -> None:
        frame = encode(message)
        with self._changed:
            for channel in self._channels.values():
                with suppress(ChannelClosed):
                    channel.send(frame)
            for rank, channel in list(self._channels.items()):
                if not self._flushed(channel):
                    log.warning("rank %d has gone: it gets no more outputs", rank)
                    channel.close()
                    del self._channels[rank]

    def _flushed(self, channel: Channel) -> bool:
        try:
            return channel.flush(_SEND_S)
        except ChannelClosed:
            return False

    def dismiss(self, error: BaseException) -> None:
        """Tell the followers why there is no engine, and leave them."""
        self._send(LeaderFailed(describe_error(error)))
        self.close()

    def on_close(self, callbacks: Iterable[Callable[[], object]]) -> None:
        """Have functions called by `close`."""
        self._close += callbacks

    def close(self) -> None:
        with self._changed:
            for channel in self._channels.values():
                channel.close()
            self._channels = {}
        while self._close:
            self._close.pop()()


class NoFollowers:
    """The door for followers of a command, which has none."""

    def objection(self, hello: Hello) -> JoinRefused | None:
        return JoinRefused("a command of Shoal leads there, not a program with an LLM: run the same on all hosts")

    def enter(self, hello: Hello, channel: Channel) -> None:
        channel.close()
