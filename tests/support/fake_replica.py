"""A fake replica, which may die at any time."""

import random
from collections.abc import Sequence
from typing import Any

from shoal.activity import AWAKE, Activity
from shoal.errors import EngineError
from shoal.wire.base import encode, replace_fields
from shoal.wire.engine import (
    ControlReply,
    EngineOrder,
    EngineRequest,
    EngineStats,
    Finish,
    ResetOutcome,
    ResetPrefixCache,
    SeqUpdate,
)
from shoal.wire.ranks import TokenLogprobs
from shoal.wire.tokens import decode_tokens, token_set
from shoal.wire.trace import TraceEvents
from support.fakes import next_token

STATS = EngineStats(0, 0, 0, 0, 0, 1 << 30, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class FakeReplica:
    """A replica that draws a token of some of its requests with each call of `updates`. With `dead` set, calls fail."""

    def __init__(self, number: int, seed: int = 0) -> None:
        self.name = f"replica {number}"
        self.died = True
        self.snapshot: EngineStats | None = None
        self.num_messages = 0
        self.held: dict[int, EngineRequest] = {}
        self.drawn: dict[int, list[int]] = {}
        self.aborted: list[int] = []
        self.added: list[EngineRequest] = []
        self.dead = ""  # how it has died
        self.activity = AWAKE
        self.orders: list[EngineOrder] = []
        self.silent = False  # True: it answers no orders
        self.refuses = ""  # why it cannot wake up
        self.traces: list[int] = []  # the limits of the traces that it was told to record; 0: to end one
        self.recorded: list[TraceEvents] = []
        self._answers: list[ControlReply] = []
        self.closed = False
        self._random = random.Random(seed)

    @property
    def channel(self) -> Any:
        raise NotImplementedError

    @property
    def has_ended(self) -> bool:
        return self.closed

    def ready(self, timeout: float) -> EngineStats | None:
        return STATS

    def add(self, spec: EngineRequest) -> None:
        self._check_alive()
        assert spec.seq not in self.held
        self.added.append(spec)
        self.held[spec.seq] = spec
        self.drawn[spec.seq] = decode_tokens(spec.tokens)[spec.num_prompt_tokens :]

    def abort(self, seqs: Sequence[int]) -> None:
        self._check_alive()
        self.aborted += [seq for seq in seqs if seq in self.held]

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._check_alive()
        self.num_messages += 1
        found = [SeqUpdate(seq, (), finish=Finish.ABORT) for seq in self.aborted if seq in self.held]
        for update in found:
            del self.held[update.seq]
        self.aborted = []
        if not self.activity.runs:
            return found
        return found + [self._step(seq) for seq in list(self.held) if self._random.random() < 0.7]

    def _step(self, seq: int) -> SeqUpdate:
        spec, drawn = self.held[seq], self.drawn[seq]
        prompt = decode_tokens(spec.tokens)[: spec.num_prompt_tokens]
        token = next_token(prompt + drawn)
        drawn.append(token)
        finish = Finish.LENGTH if len(drawn) == spec.max_tokens else None
        finish = Finish.STOP if token in token_set(spec.stop_ids) else finish
        if finish is not None:
            del self.held[seq]
        position = spec.num_prompt_tokens + len(drawn)
        return SeqUpdate(seq, (token,), (TokenLogprobs(float(position), 1, (), ()),), finish)

    def stats(self, timeout: float | None = None) -> EngineStats:
        self._check_alive()
        return replace_fields(STATS, running=len(self.held), num_blocks=10)

    def send_order(self, order: EngineOrder) -> None:
        self._check_alive()
        self.orders.append(order)
        if self.silent:
            return
        if isinstance(order, ResetPrefixCache):
            self._answers.append(ControlReply(order.id, encode(ResetOutcome(3, len(self.held)))))
        elif self.refuses and self.activity.missing and not order.activity.missing:
            self._answers.append(ControlReply(order.id, error=self.refuses, user_error=True))
        else:
            self.activity = order.activity
            self._answers.append(ControlReply(order.id))

    def answers(self) -> list[ControlReply]:
        answers, self._answers = self._answers, []
        return answers

    def set_activity(self, activity: Activity) -> None:
        self.activity = activity

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        return ResetOutcome(3, len(self.held))

    def begin_trace(self, limit: int) -> None:
        self._check_alive()
        self.traces.append(limit)

    def take_trace(self) -> list[TraceEvents]:
        recorded, self.recorded = self.recorded, []
        return recorded

    def end_trace(self) -> list[TraceEvents]:
        self.tell_trace_end()
        return self.take_trace()

    def tell_trace_end(self) -> bool:
        self._check_alive()
        recording = bool(self.traces and self.traces[-1])
        self.traces.append(0)
        if recording and not self.silent:
            self.recorded.append(TraceEvents(int(self.name.split()[-1]), (), (), last=True))
        return recording

    def say_goodbye(self) -> None:
        pass

    def end(self, deadline: float) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True

    def dismiss(self) -> None:
        self.say_goodbye()

    def abandon(self) -> None:
        self.closed = True

    def _check_alive(self) -> None:
        if self.dead:
            raise EngineError(f"{self.name} {self.dead}")
