"""Replicas whose ranks compute together, telling each other how many steps they have launched."""

import contextlib
import os
import threading
from typing import Protocol

from shoal.errors import EngineError
from shoal.protocols import Lockstep


class Joined(Lockstep, Protocol):
    """A place in a lockstep, among what is waited for: readable when others have advanced or failed."""

    backlog: bool

    def fileno(self) -> int: ...

    def clear(self) -> None:
        """Not readable until something new comes."""

    def close(self, why: str = "") -> None:
        """Leaves. `why` is empty when all is done, else what the others are told. Idempotent."""


class _SharedCounts:
    def __init__(self, size: int) -> None:
        self.lock = threading.Lock()
        self.furthest = 0
        self.failure = ""
        self.wakers: list[int | None] = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(size)]

    def wake_all_but(self, number: int) -> None:
        for other, waker in enumerate(self.wakers):
            if other != number and waker is not None:
                os.eventfd_write(waker, 1)


class LocalLockstep:
    """Of engines on threads of one process."""

    backlog = False

    def __init__(self, shared: _SharedCounts, number: int) -> None:
        self._shared = shared
        self._number = number

    @classmethod
    def of(cls, size: int) -> "list[LocalLockstep]":
        """A place for each of `size` replicas."""
        shared = _SharedCounts(size)
        return [cls(shared, number) for number in range(size)]

    def fileno(self) -> int:
        waker = self._shared.wakers[self._number]
        return -1 if waker is None else waker

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fileno())

    def launched(self, count: int) -> None:
        with self._shared.lock:
            if count > self._shared.furthest:
                self._shared.furthest = count
                self._shared.wake_all_but(self._number)

    def due(self) -> int:
        with self._shared.lock:
            if self._shared.failure:
                raise EngineError(self._shared.failure)
            return self._shared.furthest

    def close(self, why: str = "") -> None:
        with self._shared.lock:
            waker = self._shared.wakers[self._number]
            if waker is None:
                return
            self._shared.wakers[self._number] = None
            os.close(waker)
            if why:
                self._shared.failure = self._shared.failure or why
                self._shared.wake_all_but(self._number)
