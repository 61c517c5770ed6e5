"""The return of drawn tokens from the last pipeline stage to the first, which needs them for the next steps.

The first stage reads the tokens of a step only when a plan needs them. So it never waits for a step whose tokens are
not needed yet.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.parallel.pipeline import Pipeline
from shoal.wire.ranks import StepPlan, Work
from shoal.worker.sequence_table import SequenceTable


@dataclass(frozen=True, slots=True)
class _UnreadStep:
    """A step whose drawn tokens have not been read yet."""

    number: int
    epochs: dict[int, int]  # sequence -> its epoch, in the order in which the tokens are sent


class TokenReturn:
    """The first stage's side of the return of drawn tokens.

    Only the last drawn token of each sequence is sent; later plans show how many drafts were accepted.

    At most `pipeline.depth` plans are in flight, so a plan shows that the step `depth` steps before it was answered.
    The tokens of that step are read then, even if they are not needed: the last stage sends tokens of at most `depth`
    steps without waiting for the first stage to read them.
    """

    def __init__(self, pipeline: Pipeline, table: SequenceTable) -> None:
        self._pipeline = pipeline
        self._table = table
        self._steps: deque[_UnreadStep] = deque()

    @property
    def unread(self) -> tuple[int, ...]:
        """The numbers of the steps whose tokens have not been read yet, the oldest first."""
        return tuple(step.number for step in self._steps)

    def expect(self, number: int, works: Sequence[Work]) -> None:
        """Note that tokens for these works will be drawn in a step, and sent in this order."""
        if works:
            self._steps.append(_UnreadStep(number, {work.seq: self._table.epoch(work.seq) for work in works}))

    def read_for(self, plan: StepPlan) -> None:
        """Read the tokens that a plan needs, and those of steps that are known to be answered."""
        if not self._steps:
            return
        answered = plan.step - self._pipeline.depth
        needed = {work.seq for work in plan.work if self._table.needs_drawn_token(work)}
        count = 0
        for i, step in enumerate(self._steps, 1):
            if step.number <= answered or not needed.isdisjoint(step.epochs):
                count = i
        self._read(count)

    def read_all(self) -> None:
        """Read the tokens of all steps so far."""
        self._read(len(self._steps))

    def _read(self, count: int) -> None:
        for _ in range(count):
            step = self._steps.popleft()
            tokens = self._pipeline.receive_tokens(len(step.epochs)).tolist()
            for (seq, epoch), token in zip(step.epochs.items(), tokens, strict=True):
                self._table.set_last_token(seq, epoch, token)
