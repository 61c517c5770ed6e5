"""Ends a wait for channels, from another thread."""

import os
import threading


class Waker:
    """One of the things that `channel.wait` waits for."""

    backlog = False

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False
        self._awake = False  # since the last `quiet`

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        """Does nothing after `close`. Many in a row are as cheap as one: each system call would let the thread that
        waits go first."""
        with self._lock:
            if not (self._closed or self._awake):
                self._awake = True
                os.eventfd_write(self._fd, 1)

    def quiet(self) -> None:
        """Before the next wait. By whoever waits."""
        with self._lock:
            if self._awake and not self._closed:
                self._awake = False
                os.eventfd_read(self._fd)

    def close(self) -> None:
        """By whoever waits, when it does so no more. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)
