"""The process of one grammar, which compiles the grammar and follows the outputs that must obey it.

It is forked from the host (`structured.host`), which has the tokenizer in memory. The kernel enforces its limits: it
ends a process that takes too much processor time or memory, even inside a library.
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

from shoal.errors import RequestError, ShoalError, structured_outputs_error
from shoal.structured.limits import MIB, GrammarLimits
from shoal.structured.matcher import GrammarState, Vocabulary
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
from shoal.wire.request_refusal import RequestRefusal

_SLOW_WORK_NICENESS = 10  # gives way to other processes
_FAST_S = 1e-3  # an output whose last verdict took longer is handled by the thread for slow work
_IDLE_S = 3600.0  # length of one wait for messages, which is then repeated
_FLUSH_S = 5.0  # length of one attempt to send, which is then repeated


def run(channel: Channel, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
    """Run the process of one grammar until the other end closes the channel."""
    _set_limits(limits)
    with suppress(ChannelClosed):
        GrammarProcess(channel, vocabulary).run()


def _set_limits(limits: GrammarLimits) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory = _counted_memory() + limits.memory_mib * MIB
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (limits.compile_cpu_s, resource.RLIM_INFINITY))


def _counted_memory() -> int:
    """Return the bytes that the kernel counts against RLIMIT_DATA so far."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


@dataclass(slots=True)
class _FollowedOutput:
    """An output that this process follows."""

    grammar: GrammarState
    length: int = 0  # tokens so far
    is_fast: bool = True  # the last verdict took less than `_FAST_S`


class GrammarProcess:
    """Compiles one grammar and answers questions about outputs.

    Verdicts are made on the thread that reads messages. Outputs whose verdicts proved slow, and the compilation, are
    handled on a second thread with low priority.
    """

    def __init__(self, channel: Channel, vocabulary: Vocabulary) -> None:
        self._channel = channel
        self._vocabulary = vocabulary
        self._followed: dict[int, _FollowedOutput] = {}
        self._slow_work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def run(self) -> None:
        """Serve messages; return if the grammar cannot be compiled.

        Raises:
            ChannelClosed: the other end is closed.
        """
        threading.Thread(target=self._do_slow_work, daemon=True, name="long").start()
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

    def _do_slow_work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _SLOW_WORK_NICENESS)
        while True:
            self._slow_work.get()()

    def _receive(self) -> list[ToGrammar]:
        while not wait([self._channel], _IDLE_S) or not (frames := self._channel.receive()):
            pass
        return [to_grammar.decode(frame) for frame in frames]

    def _compile(self, text: str) -> GrammarState | None:
        """Return the compiled grammar, or None after telling the other end why it cannot be compiled."""
        outcome: queue.SimpleQueue[GrammarState | RequestError] = queue.SimpleQueue()

        def compile_it() -> None:
            try:
                outcome.put(GrammarState.compile(text, self._vocabulary))
            except RequestError as error:
                outcome.put(error)
            except MemoryError:
                os.abort()  # as the library does when memory runs out; the host reports it as such

        self._slow_work.put(compile_it)
        found = outcome.get()
        if isinstance(found, RequestError):
            self._send(GrammarCompiled(RequestRefusal.of(found)))
            return None
        self._send(GrammarCompiled())
        return found

    def _handle(self, message: ToGrammar, compiled: GrammarState) -> None:
        match message:
            case GrammarFollow():
                self._followed[message.seq] = followed = _FollowedOutput(compiled.copy(), is_fast=not message.output)
                self._answer(followed, message.seq, message.output, (), masked=True)
            case GrammarAsk():
                self._answer(
                    self._followed[message.seq], message.seq, message.tokens, message.drafts, masked=message.masked
                )
            case GrammarForget():
                self._followed.pop(message.seq, None)

    def _answer(self, followed: _FollowedOutput, seq: int, tokens: Ids, drafts: Ids, *, masked: bool) -> None:
        def work() -> None:
            begun = time.thread_time()
            found = make_verdict(followed.grammar, seq, tokens, drafts, masked=masked)
            took = time.thread_time() - begun
            followed.is_fast = took < _FAST_S
            followed.length += len(tokens)
            self._send(replace_fields(found, num_tokens=followed.length, cost_us=int(took * 1e6)))

        if followed.is_fast:
            work()
        else:
            self._slow_work.put(work)

    def _send(self, message: Wire) -> None:
        self._channel.send(encode(message))
        while not self._channel.flush(_FLUSH_S):  # the reader may be busy, but will read everything
            pass


def make_verdict(grammar: GrammarState, seq: int, tokens: Ids, drafts: Ids, *, masked: bool) -> Verdict:
    """Add `tokens` to an output, and return the verdict on what may follow them and each of the drafts.

    If not `masked`, the verdict only says whether the output is complete.
    """
    try:
        grammar.accept(tokens)
    except ShoalError as error:
        return Verdict(seq, refusal=RequestRefusal.of(structured_outputs_error(f"can't be followed: {error}")))
    if not masked:
        return Verdict(seq, ended=(grammar.ended,))
    drafts = drafts[: grammar.count_valid(drafts)]
    places = grammar.allowed_tokens(drafts)
    return Verdict(
        seq,
        problem=grammar.problem,
        ended=tuple(place.ended for place in places),
        drafts=drafts,
        masks=b"".join(place.row for place in places),
    )
