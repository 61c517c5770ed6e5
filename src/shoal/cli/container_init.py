"""Running as the first process of a container, whose process id is 1.

Such a process inherits all orphans, and signals that it does not handle do not end it. So it only forwards signals and
waits for processes; the program runs as its child.
"""

import contextlib
import os
import signal
import sys

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def stand_apart() -> None:
    """Return in the process that runs the program. The first process of a container forks it, forwards signals to it,
    waits for every process that ends, and exits with the program's code."""
    if os.getpid() != 1:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_FORWARDED, signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    program = os.fork()
    if program == 0:
        _take_terminal()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_FORWARDED, signal.SIGCHLD})
        return
    os._exit(_exit_code(program))


def _exit_code(program: int) -> int:
    """Return the program's exit code once it has ended; as in shells, 128 plus the number of a signal that ended it."""
    while True:
        number = signal.sigwait({*_FORWARDED, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            with contextlib.suppress(ProcessLookupError):
                os.kill(program, number)
            continue
        ended = _reap()
        if program in ended:
            code = os.waitstatus_to_exitcode(ended[program])
            return code if code >= 0 else 128 - code


def _reap() -> dict[int, int]:
    """Return the statuses of all processes that have ended, by process id."""
    found = {}
    with contextlib.suppress(ChildProcessError):  # no process is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found[ended[0]] = ended[1]
    return found


def _take_terminal() -> None:
    """Become the terminal's foreground process group, so that Ctrl-C reaches the program once: not through the first
    process as well."""
    if sys.stdin is None or not os.isatty(0):
        return
    ignored = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        if os.tcgetpgrp(0) == os.getpgrp():
            os.setpgid(0, 0)
            os.tcsetpgrp(0, os.getpgrp())
    except OSError:  # the terminal is gone
        pass
    finally:
        signal.signal(signal.SIGTTOU, ignored)
