"""The pool of grammar processes: it compiles grammars and follows the outputs that must obey them.

Nothing here blocks except `poll`, which waits no longer than it is told to. If the process of a grammar dies or exceeds
its limits, each of the outputs that must obey this grammar gets a Verdict with the reason; no other is affected.
"""

import hashlib
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import structured_outputs_error
from shoal.log import get_logger
from shoal.structured.descriptor_passing import request_fork
from shoal.structured.limits import DEFAULT_LIMITS, MAX_CHARACTERS, GrammarLimits
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import ChildProcess
from shoal.wire.base import Ids, encode
from shoal.wire.grammars import (
    GrammarAsk,
    GrammarEnded,
    GrammarFollow,
    GrammarForget,
    GrammarHostFailed,
    GrammarHostReady,
    GrammarKill,
    GrammarSource,
    ToGrammar,
    Verdict,
    from_grammar,
    from_grammar_host,
)
from shoal.wire.request_refusal import RequestRefusal

log = get_logger("grammars")

_HOST_START_S = 120.0  # time for the host to read the tokenizer; some tokenizers need `transformers`, which is slow
_FOREVER = float("inf")
_MAX_REFUSALS = 256  # refused grammars that are remembered

# Starts a host that inherits this file descriptor, on which it is to receive fork requests.
StartHost = Callable[[int], ChildProcess]


@dataclass(slots=True, eq=False)
class _ProcessHandle:
    """The process of one grammar, as the pool sees it."""

    number: int
    grammar: str
    channel: Channel | None = None  # None before the process is started and after it has ended
    started_at: float = 0.0
    compiled: bool = False
    unsent: list[ToGrammar] = field(default_factory=list)  # messages to send once it is started
    following: set[int] = field(default_factory=set)  # sequences
    asked: dict[int, float] = field(default_factory=dict)  # sequences that wait for a verdict -> since when


class GrammarPool:
    """Follows outputs, each in the process of its grammar. All methods must be called from one thread.

    Args:
        start_host: starts the grammar host; called when the first grammar comes.
        words: number of 32-bit words in a row of a mask.
    """

    def __init__(self, start_host: StartHost, words: int, limits: GrammarLimits = DEFAULT_LIMITS) -> None:
        self.words = words
        self._start_host = start_host
        self._limits = limits
        self._host: ChildProcess | None = None
        self._fork_socket: socket.socket | None = None
        self._host_started_at = 0.0
        self._host_ready_at = _FOREVER
        self._processes: OrderedDict[str, _ProcessHandle] = OrderedDict()  # by grammar, the most recently used one last
        self._by_number: dict[int, _ProcessHandle] = {}  # those that were started
        self._by_seq: dict[int, _ProcessHandle] = {}
        self._refusals: OrderedDict[bytes, RequestRefusal] = OrderedDict()  # digest of a grammar -> why it is refused
        self._verdicts: list[Verdict] = []
        self._next_number = 0

    # --- questions -----------------------------------------------------------------------------------------------

    def follow(self, seq: int, grammar: str, output: Ids = ()) -> None:
        """Begin to follow the output of a sequence, which has these tokens so far. A Verdict comes in any case."""
        refusal = self._known_refusal(grammar)
        if refusal is not None:
            self._verdicts.append(Verdict(seq, refusal=refusal))
            return
        process = self._processes.get(grammar)
        if process is None:
            self._next_number += 1
            process = self._processes[grammar] = _ProcessHandle(self._next_number, grammar)
            process.unsent.append(GrammarSource(grammar))
        self._processes.move_to_end(grammar)
        process.following.add(seq)
        self._by_seq[seq] = process
        self._send(process, GrammarFollow(seq, output))
        self._start_waiting()

    def ask(self, asks: Iterable[GrammarAsk]) -> None:
        """Report new tokens of outputs and ask for a Verdict on each. Outputs that are not followed are ignored."""
        for each in asks:
            process = self._by_seq.get(each.seq)
            if process is not None:
                self._send(process, each)

    def forget(self, seqs: Iterable[int]) -> None:
        """Stop following these outputs. Does nothing for outputs that are not followed."""
        for seq in seqs:
            process = self._by_seq.pop(seq, None)
            if process is None:
                continue
            process.following.discard(seq)
            process.asked.pop(seq, None)
            if process.following or process.compiled:
                self._send(process, GrammarForget(seq))
            else:
                self._drop(process)  # nobody waits for the grammar that it compiles
        self._start_waiting()

    # --- answers -------------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """True while a Verdict is still to come or to be fetched."""
        return bool(self._verdicts) or any(process.asked for process in self._processes.values())

    def poll(self, timeout: float, besides: Sequence[Any] = ()) -> list[Verdict]:
        """Return the verdicts that have come.

        Waits up to `timeout` seconds for the first one, or until one of `besides` (whatever `channel.wait` takes) has
        something to read.
        """
        deadline = time.monotonic() + timeout
        while True:
            remaining = 0.0 if self._verdicts else max(0.0, deadline - time.monotonic())
            readable = self._wait(min(remaining, self._until_overdue()), besides)
            self._end_overdue()
            self._start_waiting()
            if self._verdicts or time.monotonic() >= deadline or any(each in readable for each in besides):
                found, self._verdicts = self._verdicts, []
                return found

    def _wait(self, timeout: float, besides: Sequence[Any]) -> list[Any]:
        channels: list[Any] = [each.channel for each in self._by_number.values() if each.channel is not None]
        if self._host is not None:
            channels.append(self._host.channel)
        readable: list[Any] = list(wait([*channels, *besides], timeout))
        for process in [each for each in self._by_number.values() if each.channel in readable]:
            self._receive(process)
        if self._host is not None and self._host.channel in readable:
            self._receive_from_host(self._host)
        return readable

    def _receive(self, process: _ProcessHandle) -> None:
        assert process.channel is not None
        try:
            frames = process.channel.receive()
        except ChannelClosed:  # the host will report how the process ended
            process.channel.close()
            process.channel = None
            return
        for frame in frames:
            message = from_grammar.decode(frame)
            if isinstance(message, Verdict):
                if process.asked.pop(message.seq, None) is not None:
                    self._verdicts.append(message)
            elif message.refusal is not None:
                self._refuse(process, message.refusal)
                return
            else:
                process.compiled = True
                process.asked = dict.fromkeys(process.asked, time.monotonic())

    def _receive_from_host(self, host: ChildProcess) -> None:
        try:
            frames = host.channel.receive()
        except ChannelClosed:
            self._lose_host(f"the process that compiles grammars {host.describe_exit()}")
            return
        for frame in frames:
            match from_grammar_host.decode(frame):
                case GrammarHostReady():
                    self._host_ready_at = time.monotonic()
                case GrammarHostFailed() as failed:
                    self._fail_host(failed.refusal)
                    return
                case GrammarEnded() as ended if ended.number in self._by_number:
                    process = self._by_number[ended.number]
                    if ended.killed:
                        self._end_lost(process, ended.how)
                    else:
                        self._refuse(process, _unusable(f"{ended.how}; simplify it"))

    # --- processes -----------------------------------------------------------------------------------------------

    def _send(self, process: _ProcessHandle, message: GrammarFollow | GrammarAsk | GrammarForget) -> None:
        if not isinstance(message, GrammarForget):
            process.asked[message.seq] = time.monotonic()
        if process.number not in self._by_number:
            process.unsent.append(message)
        elif process.channel is not None:
            with suppress(ChannelClosed):  # the host will report how the process ended
                process.channel.send(encode(message))

    def _start_waiting(self) -> None:
        """Start processes for grammars that wait, as far as the limits allow."""
        compiling = sum(not process.compiled for process in self._by_number.values())
        waiting = [process for process in self._processes.values() if process.number not in self._by_number]
        self._retire(len(waiting))
        for process in waiting[: max(0, self._limits.compiling - compiling)]:
            if len(self._by_number) >= self._limits.live:
                return
            self._start(process)

    def _retire(self, wanted: int) -> None:
        """End idle processes, least recently used first, if too many are kept or `wanted` new ones need room."""
        idle = [each for each in self._processes.values() if each.number in self._by_number and not each.following]
        free = self._limits.live - len(self._by_number)
        surplus = max(len(idle) - self._limits.idle, min(wanted - free, len(idle)))
        for process in idle[: max(0, surplus)]:
            self._drop(process)

    def _start(self, process: _ProcessHandle) -> None:
        fork_socket = self._open_host()
        channel, theirs = Channel.pair()
        with theirs:
            request_fork(fork_socket, process.number, theirs.fileno())
        process.channel = channel
        process.started_at = time.monotonic()
        self._by_number[process.number] = process
        for message in process.unsent:
            channel.send(encode(message))
        process.unsent.clear()

    def _open_host(self) -> socket.socket:
        if self._fork_socket is None:
            self._fork_socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._host = self._start_host(theirs.fileno())
            self._host_started_at, self._host_ready_at = time.monotonic(), _FOREVER
        return self._fork_socket

    def _refuse(self, process: _ProcessHandle, why: RequestRefusal) -> None:
        """End a grammar's process, give each of its outputs a Verdict with the reason, and remember the reason."""
        self._refusals[_digest(process.grammar)] = why
        while len(self._refusals) > _MAX_REFUSALS:
            self._refusals.popitem(last=False)
        self._end_with(process, lambda seq: Verdict(seq, refusal=why))

    def _end_lost(self, process: _ProcessHandle, why: str) -> None:
        """End a process that died through no fault of its grammar, so that its outputs can be followed anew."""
        if process.following:
            log.warning("%d outputs lost the process that checks their grammar: %s", len(process.following), why)
        self._end_with(process, lambda seq: Verdict(seq, lost=why))

    def _end_with(self, process: _ProcessHandle, last_verdict: Callable[[int], Verdict]) -> None:
        for seq in process.following:
            self._by_seq.pop(seq, None)
            self._verdicts.append(last_verdict(seq))
        self._drop(process)

    def _drop(self, process: _ProcessHandle) -> None:
        if self._processes.get(process.grammar) is process:
            del self._processes[process.grammar]
        if self._by_number.pop(process.number, None) is None:
            return
        if process.channel is not None:
            process.channel.close()
            process.channel = None
        if self._host is not None:
            with suppress(ChannelClosed):  # if the host has ended, its processes have too
                self._host.channel.send(encode(GrammarKill(process.number)))

    def _lose_host(self, why: str) -> None:
        was_ready = self._host_ready_at < _FOREVER
        if not was_ready:  # starting it again might fail in the same way, endlessly
            self._fail_host(_unusable(f"{why} before it had read the model's tokenizer"))
            return
        self._end_host()
        for process in list(self._processes.values()):
            self._end_lost(process, why)

    def _fail_host(self, why: RequestRefusal) -> None:
        self._end_host()
        for process in list(self._processes.values()):
            self._end_with(process, lambda seq: Verdict(seq, refusal=why))

    def _end_host(self) -> None:
        if self._host is not None:
            self._host.kill()
            self._host = None
        if self._fork_socket is not None:
            self._fork_socket.close()
            self._fork_socket = None

    def _known_refusal(self, grammar: str) -> RequestRefusal | None:
        if len(grammar) > MAX_CHARACTERS:
            return _refusal(
                f"is too large: {len(grammar)} characters, at most {MAX_CHARACTERS} are allowed; shorten the schema or "
                "grammar"
            )
        return self._refusals.get(_digest(grammar))

    # --- deadlines -----------------------------------------------------------------------------------------------

    def _until_overdue(self) -> float:
        """Return the seconds until the next deadline."""
        if not self._by_number:
            return _FOREVER
        now = time.monotonic()
        deadlines = [self._host_deadline, *map(self._deadline, self._by_number.values())]
        return max(0.0, min(deadlines) - now)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        if self._host_deadline <= now:
            self._fail_host(_unusable(f"the model's tokenizer was not read within {_HOST_START_S:g} s"))
        for process in [each for each in self._by_number.values() if self._deadline(each) <= now]:
            seconds = self._limits.answer_s if process.compiled else self._limits.compile_s
            what = "to say what may follow" if process.compiled else "to compile"
            self._refuse(process, _unusable(f"it takes more than {seconds:g} s {what}; simplify it"))

    def _deadline(self, process: _ProcessHandle) -> float:
        if not process.compiled:
            return self._limits.compile_s + (
                _FOREVER if self._host_ready_at == _FOREVER else max(process.started_at, self._host_ready_at)
            )
        return min(process.asked.values(), default=_FOREVER) + self._limits.answer_s

    @property
    def _host_deadline(self) -> float:
        waits = self._host is not None and self._host_ready_at == _FOREVER
        return self._host_started_at + _HOST_START_S if waits else _FOREVER

    def close(self) -> None:
        """End all processes. Later calls do nothing."""
        for process in list(self._by_number.values()):
            self._drop(process)
        self._processes.clear()
        self._by_seq.clear()
        self._end_host()


def _unusable(why: str) -> RequestRefusal:
    return _refusal(f"can't be used: {why}")


def _refusal(problem: str) -> RequestRefusal:
    return RequestRefusal.of(structured_outputs_error(problem))


def _digest(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()
