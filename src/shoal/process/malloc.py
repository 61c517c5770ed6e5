"""Memory goes back to the system when large requests are done with."""

import ctypes

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>
_LARGE = 256 << 10


def give_back_what_is_large() -> None:
    """Lets each large block be a mapping of its own, which goes when the block does. glibc would do so only until the
    first such block is freed, and keep later ones of that size in its heaps, below what is in use: some 60 MB after a
    body of 30. Blocks of 256 KiB are rare enough for the system calls not to matter."""
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not every C library has it
        return
    set_option(_MMAP_THRESHOLD, _LARGE)
