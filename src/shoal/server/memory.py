"""Memory goes back to the system when large requests are done with."""

import asyncio
import ctypes
from collections.abc import Callable

_PAUSE_S = 1.0


def _find_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # only glibc has it
        return None
    trim.argtypes, trim.restype = (ctypes.c_size_t,), ctypes.c_int
    found: Callable[[int], int] = trim
    return found


_TRIM = _find_trim()


class Tidier:
    """What glibc's heaps hold free, below anything that is in use, stays theirs unless somebody asks: that was some 100
    MB after a few bodies of 30."""

    def __init__(self, trim: Callable[[int], int] | None = _TRIM) -> None:
        self._trim = trim
        self._due = False

    def soon(self) -> None:
        """Within a second, and once for all who ask until then; on a thread."""
        if self._trim is not None and not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(_PAUSE_S, self._tidy, self._trim)

    def _tidy(self, trim: Callable[[int], int]) -> None:
        self._due = False
        asyncio.get_running_loop().run_in_executor(None, trim, 0)
