"""Tokens that the last pipeline stage has drawn, as the first one learns of them.

A plan may ask for a sequence's next token while the one before is still on its way. The first stage looks it up, and
reads no message sooner than it must: so it never waits for a step whose tokens nobody needs yet.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.parallel.pipeline import Pipeline
from shoal.wire.ranks import StepPlan, Work
from shoal.worker.batch import SequenceTable


@dataclass(frozen=True, slots=True)
class _Step:
    """One that drew tokens which were not read yet."""

    number: int
    epochs: dict[int, int]  # of the sequences that drew one, in the order in which they are told


class TokenReturn:
    """The last token of each sequence is all that is told: how many guesses were right the plan shows.

    No more than `pipeline.depth` plans are out at a time, so a plan shows that the one so many steps before it was
    answered. Its tokens are read by then at the latest: the last stage has no more than these on their way, and waits.
    """

    def __init__(self, pipeline: Pipeline, table: SequenceTable) -> None:
        self._pipeline = pipeline
        self._table = table
        self._steps: deque[_Step] = deque()

    @property
    def unread(self) -> tuple[int, ...]:
        """The numbers of the steps whose tokens were not read yet, the oldest first."""
        return tuple(step.number for step in self._steps)

    def note(self, number: int, works: Sequence[Work]) -> None:
        """The tokens of these works will be drawn in a step, in this order."""
        if works:
            self._steps.append(_Step(number, {work.seq: self._table.epoch(work.seq) for work in works}))

    def read_for(self, plan: StepPlan) -> None:
        """What a plan needs, and what must have been sent because the plan shows that its step was answered."""
        if not self._steps:
            return
        answered = plan.step - self._pipeline.depth
        needed = {work.seq for work in plan.work if self._table.goes_on_from_drawn(work)}
        count = 0
        for i, step in enumerate(self._steps, 1):
            if step.number <= answered or not needed.isdisjoint(step.epochs):
                count = i
        self._read(count)

    def read_all(self) -> None:
        self._read(len(self._steps))

    def _read(self, count: int) -> None:
        for _ in range(count):
            step = self._steps.popleft()
            tokens = self._pipeline.receive_tokens(len(step.epochs)).tolist()
            for (seq, epoch), token in zip(step.epochs.items(), tokens, strict=True):
                self._table.learn(seq, epoch, token)
