"""The adoption of orphans: processes whose parent ends become children of this process for a while."""

import ctypes
import threading

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_libc = ctypes.CDLL(None, use_errno=True)


class _Subreaper:
    """Has the kernel give this process the orphans among its descendants while someone wants that.

    The attribute belongs to the whole process, which may be the user's program: it is reset as soon as possible, unless
    the program has set it itself.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._was_set = False

    def hold(self) -> None:
        """Adopt orphans until as many calls of `release`."""
        with self._lock:
            if not self._holders:
                self._was_set = _is_set()
                _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders and not self._was_set:
                _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _is_set() -> bool:
    value = ctypes.c_int(0)
    _libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0)
    return bool(value.value)


subreaper = _Subreaper()
