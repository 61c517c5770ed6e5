"""A fork server: a child process that loads once what every rank of a host needs, and forks the ranks' processes.

The import of PyTorch is the longest part of the start of a process, so only one process does it, however many ranks the
host has. A forked process shares the memory of what was loaded, and is there in some milliseconds. The fork server
forks twice: the process between ends at once, and the rank becomes a child of this process (`process.subreaper`). So
this process reads its exit code, the kernel ends it with this process, and it outlives the fork server.
"""

import contextlib
import os
import signal
import socket
from collections import deque

from shoal.process.forks import close_in_children
from shoal.process.subreaper import subreaper
from shoal.transport.channel import Channel
from shoal.transport.process import Child, ChildProcess
from shoal.wire.base import encode
from shoal.wire.ranks import Forked, ForkServerReady, Heartbeat, Loading, Preparation, TakeRank, from_fork_server

# A pool of threads of a library that ranks do not use: threads do not outlive a fork. And PyTorch for GPUs must count
# the GPUs without the driver, which does not outlive a fork either.
_VARIABLES = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
_NOT_FORKED = 255  # the exit code of a process that never was


class ForkServer:
    """A fork server. The owner waits for `channel`, and calls `receive`."""

    def __init__(self, preparation: Preparation, variables: dict[str, str], store: int | None) -> None:
        """Start the process.

        Args:
            variables: environment variables of the ranks.
            store: a file descriptor that the ranks inherit.

        Raises:
            OSError: there is no memory for a process, or no file descriptor left.
        """
        self.low_priority = preparation.low_priority
        self.memory: int | None = None  # bytes that it takes once it has loaded everything; None: it still loads
        self._asked: deque[ForkedRank] = deque()  # not answered yet
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.setblocking(False)
        close_in_children(self)
        arguments = ["--orders", str(theirs.fileno()), *([] if store is None else ["--store", str(store)])]
        passed = [theirs.fileno(), *([] if store is None else [store])]
        with theirs:
            try:
                self.process = ChildProcess("shoal.worker", arguments, {**_VARIABLES, **variables}, passed)
            except BaseException:
                self._orders.close()
                raise
        with contextlib.suppress(ConnectionError):  # it has ended already
            self._orders.send(encode(preparation))

    def close_in_child(self) -> None:
        self._orders.close()

    @property
    def channel(self) -> Channel:
        return self.process.channel

    @property
    def loads(self) -> bool:
        return self.memory is None

    @property
    def is_busy(self) -> bool:
        """True if ranks are still to be forked."""
        return bool(self._asked)

    def fork(self, order: TakeRank) -> "ForkedRank":
        """Have a rank's process forked as soon as everything is loaded. Its channel takes messages at once.

        Raises:
            OSError: there is no file descriptor left.
        """
        channel, theirs = Channel.pair()
        rank = ForkedRank(order.rank, channel, self.process)
        subreaper.hold()
        try:
            with theirs:
                socket.send_fds(self._orders, [encode(order)], [theirs.fileno()])
        except ConnectionError:  # it has ended, and so does the rank's channel, since nobody has its other end
            subreaper.release()
        except BaseException:
            subreaper.release()
            channel.close()
            raise
        else:
            self._asked.append(rank)
        return rank

    def receive(self) -> list[Heartbeat]:
        """Take in what the process has told. Return heartbeats of the ranks that wait for it, if it has shown life.

        Raises:
            ChannelClosed: it has ended. The ranks that were not forked have ended too.
        """
        heartbeats: list[Heartbeat] = []
        for message in map(from_fork_server.decode, self.channel.receive()):
            match message:
                case Loading():
                    heartbeats += [Heartbeat(rank.number, -1, "loading torch") for rank in self._asked]
                case ForkServerReady():
                    self.memory = message.memory
                case Forked():
                    self._asked.popleft().note(message)
                    subreaper.release()
        return heartbeats

    def close(self) -> None:
        """End the process. Ranks that it has forked stay. Idempotent, never raises."""
        self._orders.close()
        self.process.kill()
        for _ in self._asked:
            subreaper.release()
        self._asked.clear()


class ForkedRank(Child):
    """The process of a rank, which a fork server forks."""

    def __init__(self, number: int, channel: Channel, server: ChildProcess) -> None:
        super().__init__(channel)
        self.number = number  # of the rank
        self._server = server
        self._pid = 0  # it was not forked yet
        self._error = ""
        self._code: int | None = None

    def note(self, answer: Forked) -> None:
        self._pid, self._error = answer.pid, answer.error

    @property
    def pid(self) -> int:
        """The number of the process; 0: it was not forked yet."""
        return self._pid

    def describe(self) -> str:
        return f"process {self._pid}" if self._pid else f"to be forked by process {self._server.pid}"

    def stopped(self) -> bool:
        return super().stopped() if self._pid else self._server.stopped()

    def describe_exit(self, patience: float = 1.0) -> str:
        if self._pid:
            return super().describe_exit(patience)
        if self._error:
            return f"cannot be started: {self._error}"
        return f"was not started: process {self._server.pid} {self._server.describe_exit(patience)}"

    def _poll(self) -> int | None:
        if not self._pid:
            return _NOT_FORKED if self._error or self._server.exit_code is not None else None
        if self._code is None:
            try:
                pid, status = os.waitpid(self._pid, os.WNOHANG)
            except ChildProcessError:  # its status was dropped, or read by other code of this process
                self._exit_code_unknown = True
                self._code = _NOT_FORKED if not os.path.exists(f"/proc/{self._pid}") else None
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def _kill(self) -> None:
        """Send SIGKILL. A process that was not forked yet finds its channel closed, and ends."""
        if self._pid and self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def kill_process(self) -> None:
        if self._pid:
            super().kill_process()
