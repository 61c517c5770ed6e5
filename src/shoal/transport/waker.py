"""A way to end a wait for channels from another thread."""

import os
import threading


class Waker:
    """An event that `channel.wait` can wait for beside channels."""

    backlog = False

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False
        self._set = False  # since the last `clear`

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        """End the current or the next wait. Does nothing after `close`.

        Only the first call after `clear` makes a system call, since each one may switch to the waiting thread.
        """
        with self._lock:
            if not (self._closed or self._set):
                self._set = True
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Reset the event. The waiting thread calls this before its next wait."""
        with self._lock:
            if self._set and not self._closed:
                self._set = False
                os.eventfd_read(self._fd)

    def close(self) -> None:
        """Close the event. The waiting thread calls this after its last wait, perhaps several times."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)
