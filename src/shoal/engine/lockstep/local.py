"""Lockstep between engines on threads of one process."""

import contextlib
import os
import threading
import time
from collections.abc import Mapping

from shoal.engine.lockstep.member import SharedProgress, progress
from shoal.errors import EngineError
from shoal.wire.lockstep import LockstepState


class _Shared:
    """The part that all members share: the state of each, a failure, and an eventfd per member."""

    def __init__(self, size: int, incarnation: int) -> None:
        self.lock = threading.Lock()
        self.states = [LockstepState(incarnation)] * size
        self.failure = ""
        self.wakers: list[int | None] = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(size)]

    def wake_all_but(self, number: int) -> None:
        for other, waker in enumerate(self.wakers):
            if other != number and waker is not None:
                os.eventfd_write(waker, 1)


class LocalLockstep(SharedProgress):
    """A `LockstepMember` for an engine on a thread of this process."""

    backlog = False

    def __init__(self, shared: _Shared, number: int, incarnation: int) -> None:
        super().__init__(incarnation)
        self._shared = shared
        self._number = number

    @classmethod
    def make_all(cls, size: int) -> "list[LocalLockstep]":
        """Return the members of a new lockstep of `size` replicas."""
        incarnation = time.time_ns()
        shared = _Shared(size, incarnation)
        return [cls(shared, number, incarnation) for number in range(size)]

    def fileno(self) -> int:
        waker = self._shared.wakers[self._number]
        return -1 if waker is None else waker

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fileno())

    def others(self) -> Mapping[int, LockstepState]:
        with self._shared.lock:
            if self._shared.failure:
                raise EngineError(self._shared.failure)
            return {other: state for other, state in enumerate(self._shared.states) if other != self._number}

    def tell(self, state: LockstepState) -> None:
        with self._shared.lock:
            furthest = max(map(progress, self._shared.states))
            self._shared.states[self._number] = state
            if progress(state) > furthest or not state.steps:  # the others have launched other steps already
                self._shared.wake_all_but(self._number)

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
