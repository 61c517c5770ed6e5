"""File descriptors of this process: the limit of open files, which counts connections, and the standard streams."""

import contextlib
import os
import resource

_MAX_FILES = 1 << 16


def fill_standard_descriptors() -> None:
    """Open /dev/null as stdin, stdout or stderr if that one is closed (`2>&-`).

    Otherwise the next socket would get its number, and printed text would be written to that socket.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)


def raise_limit() -> int:
    """Raise the soft limit of open files up to the hard limit, 65,536 at most, and return it.

    Login shells and systemd set a soft limit of 1,024 for the sake of programs that use select(2). Processes that are
    started later inherit the new limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MAX_FILES if hard == unlimited else min(hard, _MAX_FILES)
    if soft != unlimited and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may refuse
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_FILES if soft == unlimited else soft
