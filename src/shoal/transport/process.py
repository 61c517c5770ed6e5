"""Child processes, each with a channel to its parent. They end at the latest with the parent."""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shoal import env
from shoal.log import get_logger
from shoal.process import import_path, open_files
from shoal.transport.channel import Channel, ChannelClosed

log = get_logger("process")

_KILL_S = 5.0
_FIRST_POLL_S, _POLL_S = 0.0005, 0.05  # the pause between two checks whether a process has ended, shorter at first
_ADOPTION_POLL_S = 0.0001
_UNKNOWN_EXIT_CODE = 255  # shown for a process whose exit code this process cannot read
_PR_SET_PDEATHSIG = 1
_STDERR = 2  # the children's stdout goes there, so that output of libraries does not mix with the parent's results
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, even if this process is suspended.

    A child calls this before everything else: it also resets an inherited SIGCHLD handler, so that the child can read
    the exit codes of its own children.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def await_adoption(parent: int) -> None:
    """Wait until the process between this one and `parent` has ended, and die with that parent from then on.

    See `process.subreaper`. If another process adopts this one, it ends.
    """
    between = os.getppid()
    while between != parent and os.getppid() == between:
        time.sleep(_ADOPTION_POLL_S)
    die_with_parent(parent)


def _block_group_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


class _Spawner:
    """Starts processes on a thread that runs as long as this process, since the kernel takes that thread as the parent.

    The thread blocks the signals that a terminal sends to the whole process group, and the children inherit that: from
    their start on, before they could ignore these signals themselves, only the parent decides when they end.
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


class Child(ABC):
    """A child process, and the channel to it. This process is its parent, and reads its exit code."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._exit_code_unknown = False
        self._waiting = threading.Lock()

    @property
    @abstractmethod
    def pid(self) -> int:
        """The number of the process."""

    @abstractmethod
    def _poll(self) -> int | None:
        """Return the exit code, or minus the number of the signal that killed the process; None while it runs."""

    @abstractmethod
    def _kill(self) -> None:
        """Send SIGKILL, unless the exit code was read already."""

    def stopped(self) -> bool:
        """Tell whether SIGSTOP or a debugger has suspended the process."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in {"T", "t"}

    def describe_exit(self, patience: float = 1.0) -> str:
        """Describe how the process ended. Waits up to `patience` seconds for its exit code.

        The exit code is known some milliseconds after the channel has ended, or some seconds for a process with much
        memory.
        """
        if not self.wait(patience):
            return "closed its channel, and has not ended yet"
        code = self.exit_code
        if code is None or self._exit_code_unknown:
            return "ended with an unknown exit code: this process ignores SIGCHLD, or waits for all of its children"
        return f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"

    @property
    def exit_code(self) -> int | None:
        """The exit code, or minus the number of the signal that killed the process; None while it runs."""
        with self._waiting:
            code = self._poll()
            return _UNKNOWN_EXIT_CODE if self._exit_code_unknown and code is not None else code

    def say(self, message: bytes) -> None:
        """Send a message if the channel is still open."""
        with contextlib.suppress(ChannelClosed, OSError):
            self.channel.send(message)
            self.channel.flush(0)

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the end of the process. Return whether it has ended."""
        deadline, pause = time.monotonic() + timeout, _FIRST_POLL_S
        while self.exit_code is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, _POLL_S)
        return True

    def kill(self) -> None:
        self.kill_process()
        self.channel.close()

    def kill_process(self) -> None:
        """Kill the process, but leave the channel open for the thread that reads it."""
        self._kill()
        if not self.wait(_KILL_S):
            log.error("process %d was killed but has not ended: it waits for a device or a file system", self.pid)


class ChildProcess(Child):
    """A child process that runs a module of Shoal with `--fd N --parent PID ...`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        passed: Sequence[int] = (),
    ) -> None:
        """`passed`: file descriptors that the child inherits, with the same numbers."""
        open_files.fill_standard_descriptors()
        channel, theirs = Channel.pair()
        super().__init__(channel)
        command = [*import_path.python_command(module), "--fd", str(theirs.fileno()), "--parent", str(os.getpid())]
        with theirs:
            self._process = _spawner.start(
                [*command, *arguments], [theirs.fileno(), *passed], env.child_environment(environment or {})
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def _poll(self) -> int | None:
        if self._process.returncode is None:
            try:
                os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:  # its status was dropped, or read by other code of this process
                self._exit_code_unknown = True
        return self._process.poll()

    def _kill(self) -> None:
        self._process.kill()


class ExitWatch:
    """A descriptor that is readable from the end of a process on. `channel.wait` can wait for it."""

    backlog = False  # as `channel.wait` expects: nothing is ever waiting to be sent

    def __init__(self, pid: int) -> None:
        """Raises OSError if there is no such process, or no descriptor left."""
        self._fd = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _signal_name(number: int) -> str:
    if number == signal.SIGBUS:
        return "SIGBUS: a file that it had mapped was truncated, or /dev/shm is full"
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def end_all(children: Sequence[Child], goodbye: bytes | None, timeout: float) -> None:
    """Send `goodbye` to all, wait up to `timeout` seconds for their end, and kill those that still run."""
    deadline = time.monotonic() + timeout
    if goodbye is not None:
        for child in children:
            child.say(goodbye)
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
    for child in children:
        child.kill()
