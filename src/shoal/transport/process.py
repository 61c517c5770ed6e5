"""Child processes that are talked to over a channel and never outlive their parent."""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shoal import env
from shoal.log import get_logger
from shoal.process import import_path, open_files
from shoal.transport.channel import Channel, ChannelClosed

log = get_logger("process")

_KILL_S = 5.0
_FIRST_PAUSE_S, _PAUSE_S = 0.0005, 0.05  # between two looks whether a process has ended
_UNTOLD = 255  # the exit code of a process that nobody can be asked about
_PR_SET_PDEATHSIG = 1
_STDERR = 2  # what a library in a child prints must not get between the parent's results
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends, even if this process is stopped. To be
    called first of all: it also has this process hear of the ends of its own children, whatever it has inherited."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def _block_group_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


class _Spawner:
    """Starts processes on a thread that lives as long as this process: "parent" above means the thread.

    It blocks the signals that reach a whole group, and children have that from it: from their first moment on, long
    before they could ignore them, their parent decides what ends.
    """

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shoal-spawn", initializer=_block_group_signals)

    def start(
        self, command: Sequence[str], fds: Sequence[int], environment: dict[str, str]
    ) -> "subprocess.Popen[bytes]":
        return self._pool.submit(
            subprocess.Popen, command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL, stdout=_STDERR
        ).result()


_spawner = _Spawner()


class ChildProcess:
    """MODULE in a Python of its own, with `--fd N --parent PID ...`, and the channel to it."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        passed: Sequence[int] = (),
    ) -> None:
        """`passed`: descriptors that the child has too, under the same numbers."""
        self._untold = False
        self._waiting = threading.Lock()
        open_files.occupy_standard()
        self.channel, theirs = Channel.pair()
        command = [*import_path.python_command(module), "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        with theirs:
            self._process = _spawner.start(
                [*command, *arguments], [theirs.fileno(), *passed], env.child_environment(environment or {})
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def stopped(self) -> bool:
        """Was it halted by SIGSTOP or a debugger?"""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in {"T", "t"}

    def death(self, patience: float = 1.0) -> str:
        """How it ended, in words. The channel's end is seen before the exit status is, by milliseconds, or by seconds
        if the process had much memory: it waits `patience` seconds for that."""
        if not self.wait(patience):
            return "closed its channel, and has not ended yet"
        code = self.exit_code
        if code is None or self._untold:
            return "ended, nobody knows how: this process ignores SIGCHLD, or waits for all of its children"
        return f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that has killed it."""
        with self._waiting:
            if self._process.returncode is None:
                try:
                    os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                except ChildProcessError:  # its status was thrown away, or given to somebody else
                    self._untold = True
            code = self._process.poll()
            return _UNTOLD if self._untold and code is not None else code

    def say(self, goodbye: bytes) -> None:
        with contextlib.suppress(ChannelClosed, OSError):
            self.channel.send(goodbye)
            self.channel.flush(0)

    def wait(self, timeout: float) -> bool:
        """True if it has ended."""
        deadline, pause = time.monotonic() + timeout, _FIRST_PAUSE_S
        while self.exit_code is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, _PAUSE_S)
        return True

    def kill(self) -> None:
        self.kill_process()
        self.channel.close()

    def kill_process(self) -> None:
        """Leaves the channel to whoever reads it."""
        self._process.kill()
        if not self.wait(_KILL_S):
            log.error("process %d does not end: it waits for a device or a file system", self.pid)


def _signal_name(number: int) -> str:
    if number == signal.SIGBUS:
        return "SIGBUS: a file that it had mapped was truncated, or there is no room in /dev/shm"
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def end_all(children: Sequence[ChildProcess], goodbye: bytes | None, timeout: float) -> None:
    """Says goodbye to all, waits up to `timeout` seconds for all of them, and kills what is left. Never raises."""
    deadline = time.monotonic() + timeout
    if goodbye is not None:
        for child in children:
            child.say(goodbye)
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    for child in children:
        child.kill()
