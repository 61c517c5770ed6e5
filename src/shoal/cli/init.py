"""Being the first process of a container: whoever has process id 1 inherits all orphans, and no signal ends it unasked.

So it stays apart from the program, which goes on as its child and waits for none but its own children.
"""

import contextlib
import os
import signal
import sys

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def stand_apart() -> None:
    """Returns in the process that is to be the program. The first process of a container forks it, forwards signals,
    waits for every process that ends, and exits as the program does."""
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
    """Return the program's exit code once it has ended; as in shells, 128 and the number of a signal that ended it."""
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
    """Statuses of all that have ended."""
    found = {}
    with contextlib.suppress(ChildProcessError):  # none is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found[ended[0]] = ended[1]
    return found


def _take_terminal() -> None:
    """At a terminal: so that Ctrl-C reaches the program once, not from there and from the first process."""
    if sys.stdin is None or not os.isatty(0):
        return
    ignored = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        if os.tcgetpgrp(0) == os.getpgrp():
            os.setpgid(0, 0)
            os.tcsetpgrp(0, os.getpgrp())
    except OSError:  # it is nobody's terminal
        pass
    finally:
        signal.signal(signal.SIGTTOU, ignored)
