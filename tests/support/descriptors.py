"""File descriptors as a process with many open files has them."""

import fcntl
import os
import resource

import pytest

_SELECT_TAKES = 1024


def moved_up(fd: int) -> int:
    """The same file under a number that select() does not take; the old number is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _SELECT_TAKES + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip(f"needs {wanted} file descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _SELECT_TAKES)
    os.close(fd)
    return high
