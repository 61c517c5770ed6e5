"""Grammars that are compiled and followed in processes of their own, seen by whoever has outputs that must obey them.

Nothing here blocks but `poll`, which waits no longer than it is told to. A grammar whose process dies, or is over its
limits, ends the outputs that it should have been obeyed by, each with a Verdict that says why; all others go on.
"""

import hashlib
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from shoal.log import get_logger
from shoal.structured.descriptor_passing import send_through_door
from shoal.structured.limits import DEFAULT_LIMITS, MOST_CHARACTERS, GrammarLimits
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

log = get_logger("grammars")

_HOST_S = 120.0  # until the host has read the tokenizer: some need `transformers`
_FOREVER = float("inf")
_KNOWN_REFUSALS = 256

# Starts a host, which inherits this descriptor: its end of the door.
StartHost = Callable[[int], ChildProcess]


@dataclass(slots=True, eq=False)
class _GrammarProcess:
    """The process of one grammar."""

    number: int
    grammar: str
    channel: Channel | None = None  # None: it waits for its start, or has ended
    begun: float = 0.0
    compiled: bool = False
    unsent: list[ToGrammar] = field(default_factory=list)  # until it starts
    following: set[int] = field(default_factory=set)
    asked: dict[int, float] = field(default_factory=dict)  # sequences whose verdict is on its way, and since when


class GrammarPool:
    """Follows outputs, each by the process of its grammar. Calls come from one thread.

    Args:
        start_host: starts the process that others are forked from, when the first grammar comes.
        words: 32-bit words in a row of a mask.
    """

    def __init__(self, start_host: StartHost, words: int, limits: GrammarLimits = DEFAULT_LIMITS) -> None:
        self.words = words
        self._start_host = start_host
        self._limits = limits
        self._host: ChildProcess | None = None
        self._door: socket.socket | None = None
        self._host_begun = 0.0
        self._host_ready = _FOREVER
        self._processes: OrderedDict[str, _GrammarProcess] = OrderedDict()  # by grammar, the one used last at the end
        self._by_number: dict[int, _GrammarProcess] = {}
        self._of_seq: dict[int, _GrammarProcess] = {}
        self._refusals: OrderedDict[bytes, str] = OrderedDict()  # digest of a grammar -> why it can't be used
        self._verdicts: list[Verdict] = []
        self._next_number = 0

    # --- what is asked -------------------------------------------------------------------------------------------

    def follow(self, seq: int, grammar: str, output: Ids = ()) -> None:
        """Begins to follow a new output, whose tokens so far are given. A Verdict comes in any case."""
        refusal = self._known_refusal(grammar)
        if refusal:
            self._verdicts.append(Verdict(seq, refused=refusal))
            return
        process = self._processes.get(grammar)
        if process is None:
            self._next_number += 1
            process = self._processes[grammar] = _GrammarProcess(self._next_number, grammar)
            process.unsent.append(GrammarSource(grammar))
        self._processes.move_to_end(grammar)
        process.following.add(seq)
        self._of_seq[seq] = process
        self._send(process, GrammarFollow(seq, output))
        self._start_waiting()

    def ask(self, asks: Iterable[GrammarAsk]) -> None:
        """Tells of tokens, and has a Verdict made for each output. Those of outputs that are not followed any more
        are passed over."""
        for each in asks:
            process = self._of_seq.get(each.seq)
            if process is not None:
                self._send(process, each)

    def forget(self, seqs: Iterable[int]) -> None:
        """Follows these outputs no more. Idempotent."""
        for seq in seqs:
            process = self._of_seq.pop(seq, None)
            if process is None:
                continue
            process.following.discard(seq)
            process.asked.pop(seq, None)
            if process.following or process.compiled:
                self._send(process, GrammarForget(seq))
            else:
                self._drop(process)  # nobody waits for what it compiles
        self._start_waiting()

    # --- what is answered ----------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Is a Verdict on its way?"""
        return bool(self._verdicts) or any(process.asked for process in self._processes.values())

    def poll(self, timeout: float, besides: Sequence[Any] = ()) -> list[Verdict]:
        """The verdicts that have come, waiting up to `timeout` seconds for the first of them; no longer than until one
        of `besides` has something to read."""
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

    def _receive(self, process: _GrammarProcess) -> None:
        assert process.channel is not None
        try:
            frames = process.channel.receive()
        except ChannelClosed:  # the host says how it has ended
            process.channel.close()
            process.channel = None
            return
        for frame in frames:
            message = from_grammar.decode(frame)
            if isinstance(message, Verdict):
                if process.asked.pop(message.seq, None) is not None:
                    self._verdicts.append(message)
            elif message.error:
                self._refuse(process, message.error)
                return
            else:
                process.compiled = True
                process.asked = dict.fromkeys(process.asked, time.monotonic())

    def _receive_from_host(self, host: ChildProcess) -> None:
        try:
            frames = host.channel.receive()
        except ChannelClosed:
            self._lose_host(f"the process that compiles grammars {host.death()}")
            return
        for frame in frames:
            match from_grammar_host.decode(frame):
                case GrammarHostReady():
                    self._host_ready = time.monotonic()
                case GrammarHostFailed() as failed:
                    self._fail_host(failed.error)
                    return
                case GrammarEnded() as ended if ended.number in self._by_number:
                    process = self._by_number[ended.number]
                    if ended.killed:
                        self._lose(process, ended.how)
                    else:
                        self._refuse(process, f"structured_outputs can't be used: {ended.how}; simplify it")

    # --- processes -----------------------------------------------------------------------------------------------

    def _send(self, process: _GrammarProcess, message: GrammarFollow | GrammarAsk | GrammarForget) -> None:
        if not isinstance(message, GrammarForget):
            process.asked[message.seq] = time.monotonic()
        if process.number not in self._by_number:
            process.unsent.append(message)
        elif process.channel is not None:
            with suppress(ChannelClosed):  # the host says how it has ended
                process.channel.send(encode(message))

    def _start_waiting(self) -> None:
        """Starts processes for grammars that wait, as far as there may be more."""
        compiling = sum(not process.compiled for process in self._by_number.values())
        waiting = [process for process in self._processes.values() if process.number not in self._by_number]
        self._retire(len(waiting))
        for process in waiting[: max(0, self._limits.compiling - compiling)]:
            if len(self._by_number) >= self._limits.live:
                return
            self._start(process)

    def _retire(self, wanted: int) -> None:
        """Ends processes that nobody needs: the ones unused for longest, where there are too many."""
        idle = [each for each in self._processes.values() if each.number in self._by_number and not each.following]
        room = self._limits.live - len(self._by_number)
        surplus = max(len(idle) - self._limits.idle, min(wanted - room, len(idle)))
        for process in idle[: max(0, surplus)]:
            self._drop(process)

    def _start(self, process: _GrammarProcess) -> None:
        door = self._open_door()
        channel, theirs = Channel.pair()
        with theirs:
            send_through_door(door, process.number, theirs.fileno())
        process.channel = channel
        process.begun = time.monotonic()
        self._by_number[process.number] = process
        for message in process.unsent:
            channel.send(encode(message))
        process.unsent.clear()

    def _open_door(self) -> socket.socket:
        if self._door is None:
            self._door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._host = self._start_host(theirs.fileno())
            self._host_begun, self._host_ready = time.monotonic(), _FOREVER
        return self._door

    def _refuse(self, process: _GrammarProcess, why: str) -> None:
        """Ends a grammar and all its outputs, and remembers it."""
        self._refusals[_digest(process.grammar)] = why
        while len(self._refusals) > _KNOWN_REFUSALS:
            self._refusals.popitem(last=False)
        self._leave(process, lambda seq: Verdict(seq, refused=why))

    def _lose(self, process: _GrammarProcess, why: str) -> None:
        """Ends a process that has ended through no fault of its grammar."""
        if process.following:
            log.warning("%d outputs are followed no more: %s", len(process.following), why)
        self._leave(process, lambda seq: Verdict(seq, lost=why))

    def _leave(self, process: _GrammarProcess, last_word: Callable[[int], Verdict]) -> None:
        for seq in process.following:
            self._of_seq.pop(seq, None)
            self._verdicts.append(last_word(seq))
        self._drop(process)

    def _drop(self, process: _GrammarProcess) -> None:
        if self._processes.get(process.grammar) is process:
            del self._processes[process.grammar]
        if self._by_number.pop(process.number, None) is None:
            return
        if process.channel is not None:
            process.channel.close()
            process.channel = None
        if self._host is not None:
            with suppress(ChannelClosed):  # its processes end with it
                self._host.channel.send(encode(GrammarKill(process.number)))

    def _lose_host(self, why: str) -> None:
        was_ready = self._host_ready < _FOREVER
        if not was_ready:  # it may never be
            self._fail_host(f"structured_outputs can't be used: {why} before it had read the model's tokenizer")
            return
        self._end_host()
        for process in list(self._processes.values()):
            self._lose(process, why)

    def _fail_host(self, why: str) -> None:
        self._end_host()
        for process in list(self._processes.values()):
            self._leave(process, lambda seq: Verdict(seq, refused=why))

    def _end_host(self) -> None:
        if self._host is not None:
            self._host.kill()
            self._host = None
        if self._door is not None:
            self._door.close()
            self._door = None

    def _known_refusal(self, grammar: str) -> str:
        if len(grammar) > MOST_CHARACTERS:
            return (
                f"structured_outputs is too large: {len(grammar)} characters, of which {MOST_CHARACTERS} are allowed; "
                f"shorten the schema or grammar"
            )
        return self._refusals.get(_digest(grammar), "")

    # --- deadlines -----------------------------------------------------------------------------------------------

    def _until_overdue(self) -> float:
        if not self._by_number:
            return _FOREVER
        now = time.monotonic()
        deadlines = [self._host_deadline, *map(self._deadline, self._by_number.values())]
        return max(0.0, min(deadlines) - now)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        if self._host_deadline <= now:
            self._fail_host(
                f"structured_outputs can't be used: the model's tokenizer was not read within {_HOST_S:g} s"
            )
        for process in [each for each in self._by_number.values() if self._deadline(each) <= now]:
            seconds = self._limits.answer_s if process.compiled else self._limits.compile_s
            what = "to say what may follow" if process.compiled else "to compile"
            self._refuse(
                process, f"structured_outputs can't be used: it takes more than {seconds:g} s {what}; simplify it"
            )

    def _deadline(self, process: _GrammarProcess) -> float:
        if not process.compiled:
            return self._limits.compile_s + (
                _FOREVER if self._host_ready == _FOREVER else max(process.begun, self._host_ready)
            )
        return min(process.asked.values(), default=_FOREVER) + self._limits.answer_s

    @property
    def _host_deadline(self) -> float:
        waits = self._host is not None and self._host_ready == _FOREVER
        return self._host_begun + _HOST_S if waits else _FOREVER

    def close(self) -> None:
        """Ends all processes. Idempotent."""
        for process in list(self._by_number.values()):
            self._drop(process)
        self._processes.clear()
        self._of_seq.clear()
        self._end_host()


def _digest(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()
