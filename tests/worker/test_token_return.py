"""Drawn tokens return to the first stage, which reads them only when it needs them."""

from collections import deque
from dataclasses import dataclass, field
from typing import cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.parallel.pipeline import Pipeline
from shoal.wire.ranks import NewSeq, Sampling, StepPlan, Work
from shoal.wire.tokens import encode_tokens
from shoal.worker.sequence_table import SequenceTable
from shoal.worker.token_return import TokenReturn
from support.fakes import steady

MAX_SEQS = 4


@dataclass
class FakePipeline:
    """A fake pipeline that holds the tokens of each step that the last stage has sent."""

    depth: int
    sent: deque[list[int]] = field(default_factory=deque)

    def receive_tokens(self, count: int) -> Tensor:
        tokens = self.sent.popleft()
        assert len(tokens) == count
        return torch.tensor(tokens)


@dataclass
class Known:
    epoch: int
    given: int  # number of tokens of its NewSeq
    computed: int = 0
    last: int = -1  # the last drawn token
    step: int = -1  # the step in which it was drawn


class FirstStage:
    """The first stage, with the parts of the engine and of the last stage that this test needs."""

    def __init__(self, max_in_flight: int) -> None:
        self.table = SequenceTable(MAX_SEQS, 1000, 4, torch.device("cpu"), samples=False)
        self.pipeline = FakePipeline(max_in_flight)
        self.token_return = TokenReturn(cast(Pipeline, self.pipeline), self.table)
        self.known: dict[int, Known] = {}
        self.step = -1
        self.drawn = 0

    def run(self, seqs: list[int], new: list[NewSeq], released: list[int]) -> Tensor:
        """Run a step in which a token is drawn for these sequences, and return the tokens that it computes."""
        self.step += 1
        works = []
        for seq in seqs:
            known = self.known[seq]
            count = max(known.given - known.computed, 1)
            works.append(Work(seq, known.computed, count, True, ()))
            known.computed += count
        plan = StepPlan(0, self.step, tuple(works), tuple(new), tuple(released))
        self.table.apply(plan)
        if not works:
            return torch.zeros(0)
        self.token_return.read_for(plan)
        built = self.table.build(plan.work)
        self.token_return.expect(self.step, built.sampled)
        return built.tokens

    def draw(self, seqs: list[int]) -> None:
        """Draw and send the tokens of the last step, as the last stage does: single tokens first, then prompts."""
        tokens = []
        for seq in seqs:
            self.drawn += 1
            self.known[seq].last, self.known[seq].step = self.drawn, self.step
            tokens.append(self.drawn)
        self.pipeline.sent.append(tokens)


def admission(seq: int, epoch: int, length: int) -> NewSeq:
    return NewSeq(seq, epoch, encode_tokens([900] * length), length, (), Sampling(seed=0))


@settings(steady, max_examples=60)
@given(st.integers(1, 4), st.data())
def test_each_plan_has_the_tokens_that_it_needs(max_in_flight: int, data: st.DataObject) -> None:
    """Sequences are added, draw tokens in some steps, are released, and are added again in a later epoch."""
    first = FirstStage(max_in_flight)
    for epoch in range(data.draw(st.integers(5, 25))):
        live = sorted(first.known)
        released = data.draw(st.lists(st.sampled_from(live), unique=True)) if live else []
        for seq in released:
            del first.known[seq]
        absent = [seq for seq in range(MAX_SEQS) if seq not in first.known]
        coming = data.draw(st.lists(st.sampled_from(absent), unique=True)) if absent else []
        new = [admission(seq, epoch, data.draw(st.integers(1, 3))) for seq in coming]
        first.known |= {each.seq: Known(epoch, each.num_prompt_tokens) for each in new}
        seqs = data.draw(st.lists(st.sampled_from(sorted(first.known)), unique=True)) if first.known else []
        if not seqs:
            first.run([], new, released)
            continue
        single = [seq for seq in seqs if first.known[seq].given - first.known[seq].computed <= 1]
        order = single + [seq for seq in seqs if seq not in single]
        wanted: list[int] = []
        for seq in order:
            known = first.known[seq]
            left = known.given - known.computed
            wanted += [900] * left if left > 0 else [known.last]
        needed = max((first.known[seq].step for seq in seqs if first.known[seq].computed), default=-1)
        before = len(first.pipeline.sent)
        assert first.run(seqs, new, released).tolist() == wanted
        # It has read the tokens up to the last step that it needs or that is no longer in flight, and no later ones.
        unread = first.token_return.unread
        assert all(number > max(needed, first.step - max_in_flight) for number in unread[:-1])
        assert len(first.pipeline.sent) == len(unread) - 1 <= before
        first.draw(order)
    first.token_return.read_all()
    assert not first.pipeline.sent


def test_a_token_of_an_older_epoch_is_dropped() -> None:
    first = FirstStage(2)
    first.known[0] = Known(0, 2)
    first.run([0], [admission(0, 0, 2)], [])
    first.draw([0])
    first.known[0] = Known(1, 3)
    first.run([0], [admission(0, 1, 3)], [0])
    first.draw([0])
    assert first.run([0], [], []).tolist() == [2]
    assert not first.pipeline.sent


def test_unneeded_tokens_are_read_when_their_step_leaves_the_pipeline() -> None:
    first = FirstStage(2)
    for seq in range(4):
        first.known[seq] = Known(0, 3)
        first.run([seq], [admission(seq, 0, 3)], [])
        first.draw([seq])
        assert len(first.pipeline.sent) == min(seq + 1, 2)
