"""The grammar host: a process that has the model's tokenizer in memory and forks itself for each grammar.

So the process of a grammar starts within milliseconds, and a crash of one affects no other.
"""

import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from shoal.errors import RequestError
from shoal.log import get_logger
from shoal.process import garbage_collector
from shoal.structured import grammar_process
from shoal.structured.descriptor_passing import ForkRequests
from shoal.structured.limits import DEFAULT_LIMITS, GrammarLimits
from shoal.structured.matcher import Vocabulary
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import die_with_parent
from shoal.wire.base import Stop, encode
from shoal.wire.grammars import GrammarEnded, GrammarHostFailed, GrammarHostReady, to_grammar_host
from shoal.wire.request_refusal import RequestRefusal

log = get_logger("grammars")

_IDLE_S = 3600.0  # length of one wait for messages, which is then repeated
# A process that was ended by one of these signals was killed from outside, not because of its grammar.
_KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class _ChildExits:
    """A pipe that becomes readable when a child process has ended. `channel.wait` can wait for it."""

    backlog = False  # as `channel.wait` expects: nothing is ever waiting to be sent

    def __init__(self) -> None:
        self._fd, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def fileno(self) -> int:
        return self._fd

    def clear(self) -> None:
        os.read(self._fd, 4096)


class GrammarHost:
    """Forks and kills grammar processes on request, and reports how they ended.

    Args:
        channel: leads to the process that started this one.
        fork_socket: brings the requests to fork a process (see `descriptor_passing`).
    """

    def __init__(self, channel: Channel, fork_socket: socket.socket, limits: GrammarLimits = DEFAULT_LIMITS) -> None:
        self._channel = channel
        self._fork_requests = ForkRequests(fork_socket)
        self._limits = limits
        self._child_exits = _ChildExits()
        self._numbers: dict[int, int] = {}  # pid -> number

    def run(self, make_vocabulary: Callable[[], Vocabulary]) -> int:
        """Serve requests until a Stop or until the other end is closed; return an exit code."""
        try:
            vocabulary = make_vocabulary()
            garbage_collector.freeze()  # otherwise the collector would write to memory pages that forks share
            self._channel.send(encode(GrammarHostReady()))
            while self._handle_events(vocabulary):
                pass
        except RequestError as error:
            self._channel.send(encode(GrammarHostFailed(RequestRefusal.of(error))))
            self._channel.flush(1.0)
            return error.exit_code
        except ChannelClosed:
            pass
        return 0

    def _handle_events(self, vocabulary: Vocabulary) -> bool:
        """Wait for events and handle them; return False after a Stop."""
        sources: list[Any] = [self._channel, self._fork_requests, self._child_exits]
        readable: list[Any] = list(wait(sources, _IDLE_S))
        if self._child_exits in readable:
            self._child_exits.clear()
            self._reap()
        if self._channel in readable:
            for frame in self._channel.receive():
                message = to_grammar_host.decode(frame)
                if isinstance(message, Stop):
                    return False
                self._kill(message.number)
        if self._fork_requests in readable:
            number, fd = self._fork_requests.receive()
            self._fork(number, fd, vocabulary)
        return True

    def _fork(self, number: int, fd: int, vocabulary: Vocabulary) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            os.close(fd)
            self._numbers[pid] = number
            return
        code = 1
        try:
            die_with_parent(parent)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._channel.close()
            self._fork_requests.close()
            grammar_process.run(Channel.from_fd(fd), vocabulary, self._limits)
            code = 0
        except BaseException:  # this is the child: it must never return into the host's loop
            log.exception("the process of a grammar failed")
        finally:
            os._exit(code)

    def _kill(self, number: int) -> None:
        for pid, each in self._numbers.items():
            if each == number:  # it has not been reaped, so no other process can have its pid
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            found = GrammarEnded(self._numbers.pop(pid), describe_exit(code, self._limits), -code in _KILLS)
            self._channel.send(encode(found))


def describe_exit(code: int, limits: GrammarLimits) -> str:
    """Return why the process of a grammar ended, in words for the author of the grammar."""
    match -code:
        case signal.SIGXCPU:
            return f"it takes more than {limits.compile_cpu_s} s of processor time to compile"
        case signal.SIGABRT:
            return f"it takes more than {limits.memory_mib} MiB of memory"
        case signal.SIGSEGV | signal.SIGBUS:
            return "it is nested too deeply, or has numbers that are too large"
    return f"its process ended with code {code}" if code >= 0 else f"its process was killed by signal {-code}"
