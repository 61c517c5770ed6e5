"""How many files, which are connections too, this process may have open; and what the first three of them are."""

import contextlib
import os
import resource

_MOST = 1 << 16


def occupy_standard() -> None:
    """Puts /dev/null where stdin, stdout or stderr is closed (`2>&-`): else the next socket would get that number, and
    what somebody prints would go into it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)


def allow() -> int:
    """Raises the limit as far as the system lets everybody, and gives it. Login shells and systemd set a soft limit of
    1,024 for the sake of programs that use select(2); processes started later inherit the new one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _MOST if hard == unlimited else min(hard, _MOST)
    if soft != unlimited and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may refuse
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == unlimited else soft
