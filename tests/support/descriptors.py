"""File descriptors with large numbers."""

import contextlib
import os
import resource
from collections.abc import Iterator

import pytest

_SELECT_LIMIT = 1024  # select() takes only smaller numbers


@contextlib.contextmanager
def many_open_files() -> Iterator[None]:
    """Open so many files that the next ones get numbers that select() does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _SELECT_LIMIT + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip(f"needs {wanted} file descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    opened = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while opened[-1] < _SELECT_LIMIT:
            opened.append(os.dup(opened[0]))
        yield
    finally:
        for fd in opened:
            os.close(fd)
