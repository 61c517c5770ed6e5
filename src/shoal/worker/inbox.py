"""The messages that wait for the main thread of a rank's process."""

import threading
import time
from collections import deque
from collections.abc import Callable

from shoal.transport.channel import Channel, wait
from shoal.wire.ranks import RankSetup, ToRankProcess, to_rank

_WAIT_S = 3600.0
_LOOK_S = 0.02  # how often the watching thread reads the channel while the main thread computes


class Inbox:
    """The messages of a channel, which the main thread takes with `get`, while another thread watches.

    A thread that waits in `get` reads the channel itself, so a plan wakes only the thread that computes it. A plan that
    comes while the main thread computes wakes nobody: it is found in the channel when the main thread wants it. The
    watching thread is there for what can't wait so long: a new setup, and the end of the channel.
    """

    def __init__(self, channel: Channel, arrived: Callable[[ToRankProcess], None]) -> None:
        """`arrived` is called with each message by the thread that has read it."""
        self._channel = channel
        self._arrived = arrived
        self._messages: deque[ToRankProcess] = deque()
        self._reading = threading.Lock()  # the thread that has it may read the channel
        self._main_waits = False  # the main thread reads the channel as soon as something comes
        self._num_taken = 0
        self._num_seen = 0  # of those taken, when the watching thread looked last
        self._resting = False  # the watching thread waits for `_stir`
        self._stir = threading.Event()

    def get(self) -> ToRankProcess:
        """Return the next message, after waiting for it.

        Raises:
            ChannelClosed: the channel has ended.
        """
        while (message := self._take()) is None:
            wait([self._channel], _WAIT_S)
        self._num_taken += 1
        if self._resting:
            self._stir.set()
        return message

    def _take(self) -> ToRankProcess | None:
        with self._reading:
            if not self._messages:
                self._read()
            self._main_waits = not self._messages
            return self._messages.popleft() if self._messages else None

    def watch(self, seconds: float) -> None:
        """Look after the channel for some seconds, on another thread than the main thread.

        Raises:
            ChannelClosed: the channel has ended.
        """
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._look():
                self._rest(left)
            else:
                time.sleep(min(_LOOK_S, left))

    def _look(self) -> bool:
        """Read the channel, unless the main thread waits for it. Return whether that thread has been idle."""
        with self._reading:
            if not self._main_waits:
                self._read()
            idle = self._main_waits and self._num_taken == self._num_seen
            self._num_seen = self._num_taken
            return idle

    def _rest(self, seconds: float) -> None:
        """Wait until the main thread takes a message."""
        self._resting = True
        if self._num_taken == self._num_seen:
            self._stir.wait(seconds)
        self._resting = False
        self._stir.clear()

    def _read(self) -> None:
        for message in map(to_rank.decode, self._channel.receive()):
            if isinstance(message, RankSetup):  # what came before is for groups that are formed anew now
                self._messages.clear()
            self._messages.append(message)
            self._arrived(message)
