"""The host of the grammars' processes: it has the model's tokenizer in memory, and forks itself for each grammar.

So a grammar's process is there in milliseconds, and what one of them does to itself harms nobody else.
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
from shoal.structured.descriptor_passing import DescriptorReceiver
from shoal.structured.limits import DEFAULT_LIMITS, GrammarLimits
from shoal.structured.matcher import Vocabulary
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import die_with_parent
from shoal.wire.base import Stop, encode
from shoal.wire.grammars import GrammarEnded, GrammarHostFailed, GrammarHostReady, to_grammar_host

log = get_logger("grammars")

_IDLE_S = 3600.0
_KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class _Death:
    """Becomes readable when a child has ended; one of the things that `channel.wait` waits for."""

    backlog = False

    def __init__(self) -> None:
        self._fd, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def fileno(self) -> int:
        return self._fd

    def quiet(self) -> None:
        os.read(self._fd, 4096)


class GrammarHost:
    def __init__(self, channel: Channel, door: socket.socket, limits: GrammarLimits = DEFAULT_LIMITS) -> None:
        """`channel`: to whoever started this process. Through the `door` come numbers and channels of processes to be
        forked."""
        self._channel = channel
        self._door = DescriptorReceiver(door)
        self._limits = limits
        self._death = _Death()
        self._numbers: dict[int, int] = {}  # pid -> number

    def run(self, make_vocabulary: Callable[[], Vocabulary]) -> int:
        """Until it is told to stop, or nobody is there any more; gives an exit code."""
        try:
            vocabulary = make_vocabulary()
            garbage_collector.settle()  # or the collector would write to pages that all processes share
            self._channel.send(encode(GrammarHostReady()))
            while self._step(vocabulary):
                pass
        except RequestError as error:
            self._channel.send(encode(GrammarHostFailed(str(error))))
            self._channel.flush(1.0)
            return error.exit_code
        except ChannelClosed:
            pass
        return 0

    def _step(self, vocabulary: Vocabulary) -> bool:
        """False: the end was asked for."""
        sources: list[Any] = [self._channel, self._door, self._death]
        readable: list[Any] = list(wait(sources, _IDLE_S))
        if self._death in readable:
            self._death.quiet()
            self._reap()
        if self._channel in readable:
            for frame in self._channel.receive():
                message = to_grammar_host.decode(frame)
                if isinstance(message, Stop):
                    return False
                self._kill(message.number)
        if self._door in readable:
            number, fd = self._door.receive()
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
            self._door.close()
            grammar_process.run(Channel.from_fd(fd), vocabulary, self._limits)
            code = 0
        except BaseException:  # nothing may get back into the host's loop
            log.exception("the process of a grammar has failed")
        finally:
            os._exit(code)

    def _kill(self, number: int) -> None:
        for pid, each in self._numbers.items():
            if each == number:  # it has not been reaped: nobody else has its pid
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            found = GrammarEnded(self._numbers.pop(pid), ended(code, self._limits), -code in _KILLS)
            self._channel.send(encode(found))


def ended(code: int, limits: GrammarLimits) -> str:
    """The end of a grammar's process, in words that its author understands."""
    match -code:
        case signal.SIGXCPU:
            return f"it takes more than {limits.compile_cpu_s} s of processor time to compile"
        case signal.SIGABRT:
            return f"it takes more than {limits.memory_mib} MiB of memory"
        case signal.SIGSEGV | signal.SIGBUS:
            return "it is nested too deeply, or has numbers that are too large"
    return f"its process ended with code {code}" if code >= 0 else f"its process was ended by signal {-code}"
