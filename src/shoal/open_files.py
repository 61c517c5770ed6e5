"""How many files, which are connections too, this process may have open."""

import contextlib
import resource

_MOST = 1 << 16


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
