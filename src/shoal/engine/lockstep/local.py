"""Lockstep between engines on threads of one process."""

import contextlib
import os
import threading
from typing import Protocol

from shoal.errors import EngineError
from shoal.protocols import Lockstep


class LockstepMember(Lockstep, Protocol):
    """A replica's end of a lockstep. A wait for channels can include it.

    It is readable when another replica has launched a step or failed.
    """

    backlog: bool

    def fileno(self) -> int: ...

    def clear(self) -> None:
        """Make this not readable until another replica launches a step or fails."""

    def close(self, why: str = "") -> None:
        """Leave the lockstep. Idempotent.

        Args:
            why: the failure that the other replicas are told of; "" if the work is done.
        """


class _SharedCounts:
    """The state that all members share: the highest number of launched steps, a failure, and an eventfd per member."""

    def __init__(self, size: int) -> None:
        self.lock = threading.Lock()
        self.most_launched = 0
        self.failure = ""
        self.wakers: list[int | None] = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(size)]

    def wake_all_but(self, number: int) -> None:
        for other, waker in enumerate(self.wakers):
            if other != number and waker is not None:
                os.eventfd_write(waker, 1)


class LocalLockstep:
    """A `LockstepMember` for an engine on a thread of this process."""

    backlog = False

    def __init__(self, shared: _SharedCounts, number: int) -> None:
        self._shared = shared
        self._number = number

    @classmethod
    def make_all(cls, size: int) -> "list[LocalLockstep]":
        """Return the members of a new lockstep of `size` replicas."""
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
            if count > self._shared.most_launched:
                self._shared.most_launched = count
                self._shared.wake_all_but(self._number)

    def steps_due(self) -> int:
        with self._shared.lock:
            if self._shared.failure:
                raise EngineError(self._shared.failure)
            return self._shared.most_launched

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
