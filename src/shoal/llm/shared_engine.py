"""An engine that several threads use: in turns, in the process that has started it, and never left in mid-step."""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.errors import ClosedError
from shoal.process.forks import Owner
from shoal.process.interrupts import interrupts
from shoal.protocols import EngineClient
from shoal.wire.engine import EngineStats

_CLOSE_S = 5.0  # how long `close` waits for whoever has its turn; then it ends what that one waits for


class Queue:
    """A lock that is handed over in the order in which it was asked for: nobody who asks again and again keeps others
    out."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()  # the first one's is free, or is held by whoever has its turn
        self._holder: int | None = None

    @property
    def is_mine(self) -> bool:
        return self._holder == threading.get_ident()

    @property
    def waiting(self) -> int:
        """Those whose turn has not come."""
        return max(len(self._waiting) - 1, 0)

    @contextmanager
    def turn(self, timeout: float = -1) -> Iterator[bool]:
        """False: its turn has not come within `timeout` seconds; -1 is for ever."""
        ticket = threading.Lock()
        ticket.acquire()
        with self._changing:
            self._waiting.append(ticket)
            if len(self._waiting) == 1:
                ticket.release()
        try:
            came = ticket.acquire(timeout=timeout)
            if came:
                self._holder = threading.get_ident()
            yield came
        finally:
            with self._changing:
                if ticket is self._waiting[0]:
                    self._holder = None
                    if len(self._waiting) > 1:
                        self._waiting[1].release()
                self._waiting.remove(ticket)


class SharedEngine:
    """Every use of an engine goes through `turn`."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self._owner = Owner("LLM")
        self._queue = Queue()
        self._closed = False

    @contextmanager
    def turn(self) -> Iterator[EngineClient]:
        """Nobody else uses the engine meanwhile, and Ctrl-C waits. To be left soon, and never entered twice.

        Raises:
            ClosedError: it was closed, or belongs to the process from which this one was forked.
        """
        self._owner.check()
        with interrupts.held(), self._queue.turn():
            if self._closed:
                raise ClosedError("the engine was closed")
            yield self.client

    @property
    def is_mine(self) -> bool:
        """Does this thread have its turn?"""
        return self._queue.is_mine

    def check(self) -> None:
        """
        Raises:
            ClosedError: it belongs to the process from which this one was forked.
        """
        self._owner.check()

    def stats(self) -> EngineStats:
        with self.turn() as client:
            return client.stats()

    def close(self) -> None:
        """Ends the engine. Whoever has its turn ends it first; who comes next hears that it was closed. In a forked
        child it does nothing. Idempotent."""
        if not self._owner.is_here:
            return
        self._closed = True
        with interrupts.held():
            if self.is_mine:
                self.client.close()
            else:
                with self._queue.turn(_CLOSE_S):
                    self.client.close()
