"""Large numbers of file descriptors, as in a process with many open files."""

import contextlib
import os
import resource
from collections.abc import Iterator

import pytest

_SELECT_TAKES = 1024


@contextlib.contextmanager
def many_open_files() -> Iterator[None]:
    """Give files that are opened inside a number that is too large for select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _SELECT_TAKES + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip(f"needs {wanted} file descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    opened = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while opened[-1] < _SELECT_TAKES:
            opened.append(os.dup(opened[0]))
        yield
    finally:
        for fd in opened:
            os.close(fd)
