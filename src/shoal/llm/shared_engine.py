"""An engine that several threads use in turns.

Only the process that started the engine may use it, and a KeyboardInterrupt never comes in the middle of a step.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.errors import ClosedError
from shoal.process.forks import Owner
from shoal.process.interrupts import interrupts
from shoal.protocols import Engine
from shoal.wire.engine import EngineStats

_CLOSE_S = 5.0  # how long `close` waits for the thread whose turn it is, before it closes the engine under it


class FairLock:
    """A lock that threads get in the order in which they asked for it.

    With a plain lock, a thread that asks for it again and again can keep all others out.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._tickets: deque[threading.Lock] = deque()  # the first ticket is free, or its thread has the turn
        self._holder: int | None = None

    @property
    def is_mine(self) -> bool:
        """True if it is the turn of the calling thread."""
        return self._holder == threading.get_ident()

    @property
    def waiting(self) -> int:
        """The number of threads that wait for their turn."""
        return max(len(self._tickets) - 1, 0)

    @contextmanager
    def turn(self, timeout: float = -1) -> Iterator[bool]:
        """Wait for the turn of the calling thread, which lasts until the block ends.

        Gives False if the turn has not come within `timeout` seconds; with -1 there is no limit.
        """
        ticket = threading.Lock()
        ticket.acquire()
        with self._changing:
            self._tickets.append(ticket)
            if len(self._tickets) == 1:
                ticket.release()
        try:
            came = ticket.acquire(timeout=timeout)
            if came:
                self._holder = threading.get_ident()
            yield came
        finally:
            with self._changing:
                if ticket is self._tickets[0]:
                    self._holder = None
                    if len(self._tickets) > 1:
                        self._tickets[1].release()
                self._tickets.remove(ticket)


class SharedEngine:
    """An engine for several threads. Every use of it goes through `turn`."""

    def __init__(self, client: Engine) -> None:
        self.client = client
        self._owner = Owner("LLM")
        self._lock = FairLock()
        self._closed = False

    @contextmanager
    def turn(self) -> Iterator[Engine]:
        """Give the engine to the calling thread until the block ends.

        Meanwhile no other thread can use it, and a KeyboardInterrupt is held back, so the block should be short. A
        thread must not enter it twice.

        Raises:
            ClosedError: the engine was closed, or belongs to the process from which this one was forked.
        """
        self._owner.check()
        with interrupts.held(), self._lock.turn():
            if self._closed:
                raise ClosedError("the engine was closed")
            yield self.client

    @property
    def is_mine(self) -> bool:
        """True if it is the turn of the calling thread."""
        return self._lock.is_mine

    def check(self) -> None:
        """Check that this process may use the engine.

        Raises:
            ClosedError: it belongs to the process from which this one was forked.
        """
        self._owner.check()

    def stats(self) -> EngineStats:
        with self.turn() as client:
            return client.stats()

    def close(self) -> None:
        """Close the engine. Idempotent; in a forked child it does nothing.

        The thread whose turn it is may finish its turn first, within a few seconds. Threads that come later get a
        ClosedError.
        """
        if not self._owner.is_here:
            return
        self._closed = True
        with interrupts.held():
            if self.is_mine:
                self.client.close()
            else:
                with self._lock.turn(_CLOSE_S):
                    self.client.close()
