"""The process of one grammar: it compiles it, and follows the outputs that must obey it.

It is forked from the host (`structured.host`), which has the tokenizer in memory. Its limits are the kernel's: what
takes too much processor time or memory is ended, whatever library it is in.
"""

import os
import queue
import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from shoal.errors import RequestError, ShoalError
from shoal.structured.limits import MIB, GrammarLimits
from shoal.structured.matcher import Grammar, Vocabulary
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.wire.base import Ids, Wire, encode, replace_fields
from shoal.wire.grammars import (
    GrammarAsk,
    GrammarCompiled,
    GrammarFollow,
    GrammarForget,
    GrammarSource,
    ToGrammar,
    Verdict,
    to_grammar,
)

_NICE = 10  # of work that takes long: others need the processors more
_QUICK_S = 1e-3  # a verdict that takes longer is made behind those of other outputs
_IDLE_S = 3600.0
_FLUSH_S = 5.0


def run(channel: Channel, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
    """Until the other end closes the channel."""
    _limit(limits)
    with suppress(ChannelClosed):
        GrammarProcess(channel, vocabulary).run()


def _limit(limits: GrammarLimits) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = _data_bytes() + limits.memory_mib * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.compile_cpu_s, resource.RLIM_INFINITY))


def _data_bytes() -> int:
    """What the kernel counts against RLIMIT_DATA so far."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


@dataclass(slots=True)
class _Followed:
    grammar: Grammar
    length: int = 0  # tokens of the output
    quick: bool = True  # its last verdict took no time to speak of


class GrammarProcess:
    """Answers on the thread that reads; what has proved to take long, on a second one that yields to everybody."""

    def __init__(self, channel: Channel, vocabulary: Vocabulary) -> None:
        self._channel = channel
        self._vocabulary = vocabulary
        self._followed: dict[int, _Followed] = {}
        self._long: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def run(self) -> None:
        """
        Raises:
            ChannelClosed: the other end has gone.
        """
        threading.Thread(target=self._work, daemon=True, name="long").start()
        first, *rest = self._receive()
        assert isinstance(first, GrammarSource)
        compiled = self._compile(first.text)
        if compiled is None:
            return
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        while True:
            for message in rest:
                self._handle(message, compiled)
            rest = self._receive()

    def _work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while True:
            self._long.get()()

    def _receive(self) -> list[ToGrammar]:
        while not wait([self._channel], _IDLE_S) or not (frames := self._channel.receive()):
            pass
        return [to_grammar.decode(frame) for frame in frames]

    def _compile(self, text: str) -> Grammar | None:
        """The compiled grammar, or None when the other end was told why there is none."""
        outcome: queue.SimpleQueue[Grammar | str] = queue.SimpleQueue()

        def compile_it() -> None:
            try:
                outcome.put(Grammar.compile(text, self._vocabulary))
            except RequestError as error:
                outcome.put(str(error))
            except MemoryError:
                os.abort()  # as the library does: the host tells what that means

        self._long.put(compile_it)
        found = outcome.get()
        if isinstance(found, str):
            self._send(GrammarCompiled(found))
            return None
        self._send(GrammarCompiled())
        return found

    def _handle(self, message: ToGrammar, compiled: Grammar) -> None:
        match message:
            case GrammarFollow():
                self._followed[message.seq] = followed = _Followed(compiled.fresh(), quick=not message.output)
                self._answer(followed, message.seq, message.output, (), masked=True)
            case GrammarAsk():
                self._answer(
                    self._followed[message.seq], message.seq, message.tokens, message.drafts, masked=message.masked
                )
            case GrammarForget():
                self._followed.pop(message.seq, None)

    def _answer(self, followed: _Followed, seq: int, tokens: Ids, drafts: Ids, *, masked: bool) -> None:
        def work() -> None:
            begun = time.thread_time()
            found = verdict(followed.grammar, seq, tokens, drafts, masked=masked)
            took = time.thread_time() - begun
            followed.quick = took < _QUICK_S
            followed.length += len(tokens)
            self._send(replace_fields(found, behind=followed.length, cost_us=int(took * 1e6)))

        if followed.quick:
            work()
        else:
            self._long.put(work)

    def _send(self, message: Wire) -> None:
        self._channel.send(encode(message))
        while not self._channel.flush(_FLUSH_S):  # whoever asked may be busy, and reads it all in the end
            pass


def verdict(grammar: Grammar, seq: int, tokens: Ids, drafts: Ids, *, masked: bool) -> Verdict:
    """Takes `tokens` in, and says what may follow them and the drafts."""
    try:
        grammar.accept(tokens)
    except ShoalError as error:
        return Verdict(seq, refused=str(error))
    if not masked:
        return Verdict(seq, ended=(grammar.ended,))
    drafts = drafts[: grammar.valid(drafts)]
    places = grammar.places(drafts)
    return Verdict(
        seq,
        problem=grammar.problem,
        ended=tuple(place.ended for place in places),
        drafts=drafts,
        masks=b"".join(place.row for place in places),
    )
