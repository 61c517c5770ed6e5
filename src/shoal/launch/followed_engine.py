"""The engine of another process that runs the same program: this process makes the same calls, and gets the results."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from shoal.activity import Activity
from shoal.addresses import Address
from shoal.errors import ConfigError, EngineError, ShoalError
from shoal.launch.node import BackgroundNode
from shoal.launch.shared_calls import Call, read_error, result_of
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.connecting import connect
from shoal.wire.base import WireError
from shoal.wire.calls import FOLLOWERS_DOOR, CallAnswer, EngineReady, LeaderFailed, to_follower
from shoal.wire.credentials import Credentials
from shoal.wire.engine import EngineRequest, EngineStats, ResetOutcome, SeqUpdate
from shoal.wire.trace import TraceEvents

T = TypeVar("T")
_POLL_S = 0.5
_CLOSE_S = 5.0


class FollowedEngine:
    """`SharedCalls` of a follower, and an `Engine` that this process does not have."""

    def __init__(
        self,
        address: Address,
        credentials: Credentials,
        *,
        rank: int,
        size: int,
        agreement: Mapping[str, str],
        timeout: float,
        node: BackgroundNode | None = None,
    ) -> None:
        """Connect to the process that leads, and wait until its engine is ready.

        Args:
            address: of the rendezvous of that process.
            credentials: of this host.
            rank, size: the number of this process, and of all.
            agreement: what all of them must have in common.
            timeout: how long to try to connect, in seconds.
            node: runs ranks of this host for that engine. It is started here, and ended by `close`.

        Raises:
            ShoalError: the other process cannot be reached, refuses this one, or has failed.
        """
        self._rank = rank
        self._number = 0
        self._answers: deque[CallAnswer] = deque()
        self._stats: EngineStats | None = None
        self._failure: ShoalError | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._node = node
        self._channel: Channel = connect(
            address, credentials, room=FOLLOWERS_DOOR, rank=rank, size=size, agreement=agreement, timeout=timeout
        )
        self._thread = threading.Thread(target=self._read, daemon=True, name="shoal-follower")
        self._thread.start()
        try:
            if node is not None:
                node.start(self._fail)
            self._await_ready()
        except BaseException:
            self.close()
            raise

    # --- the thread that reads -----------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while not self._closing:
                if self._channel.has_frame or wait([self._channel], _POLL_S):
                    for frame in self._channel.receive():
                        self._take(to_follower.decode(frame))
        except ChannelClosed:
            self._fail(EngineError("rank 0 has ended, or has closed its LLM"))
        except WireError as error:
            self._fail(EngineError(f"rank 0 has sent a message that cannot be read: {error}"))

    def _take(self, message: EngineReady | CallAnswer | LeaderFailed) -> None:
        with self._changed:
            match message:
                case EngineReady():
                    self._stats = message.stats
                case CallAnswer():
                    self._answers.append(message)
                case LeaderFailed():
                    self._failure = read_error(message.error)
            self._changed.notify_all()

    def _fail(self, error: ShoalError) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    # --- calls ---------------------------------------------------------------------------------------------------

    def _await_ready(self) -> None:
        """Wait for the engine. The process that leads has deadlines for its start, and ends if they pass."""
        with self._changed:
            while self._stats is None:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait(_POLL_S)

    def make(self, call: Call, run: Callable[[], T]) -> T:
        """Return the result of the same call of the process that leads. `run` is not called."""
        with self._changed:
            self._number += 1
            while not self._answers:
                if self._failure is not None:
                    raise type(self._failure)(f"rank {self._rank}, call {self._number} ({call}): {self._failure}")
                self._changed.wait(_POLL_S)
            found = self._answers.popleft()
        if (found.call, found.digest) != (str(call), call.digest):
            same = " with other arguments" if found.call == str(call) else ""
            raise ConfigError(
                f"call {self._number} of rank {self._rank} is {call}, but that of rank 0 is {found.call}{same}: all "
                "processes must make the same calls in the same order"
            )
        result: T = result_of(found)
        return result

    def close(self) -> None:
        self._closing = True
        if self._node is not None:
            self._node.close()
        self._channel.shut_down()  # so that the thread ends
        self._thread.join(_CLOSE_S)
        self._channel.close()

    # --- what only the process that leads can do -------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Return the stats of the engine when it was ready."""
        assert self._stats is not None
        return self._stats

    def add(self, request: EngineRequest) -> None:
        raise self._elsewhere()

    def abort(self, seqs: Sequence[int]) -> None:
        raise self._elsewhere()

    def updates(self, timeout: float) -> list[SeqUpdate]:
        raise self._elsewhere()

    def set_activity(self, activity: Activity) -> None:
        raise self._elsewhere()

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        raise self._elsewhere()

    def begin_trace(self, limit: int) -> None:
        raise self._elsewhere()

    def take_trace(self) -> list[TraceEvents]:
        raise self._elsewhere()

    def end_trace(self) -> list[TraceEvents]:
        raise self._elsewhere()

    def _elsewhere(self) -> ConfigError:
        return ConfigError(
            f"only rank 0 has the engine, and this is rank {self._rank}: use generate, chat or beam_search, whose "
            "results all processes get"
        )
