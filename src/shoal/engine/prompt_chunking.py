"""The choice of how many prompt tokens go into a step, so that all stages of a pipeline have work.

Stages work on batches that follow each other, so a stage waits where one batch takes longer than the next. A step
takes a + b x tokens on every stage: `a` is for reading the weights, whatever is computed with them. Computing T
tokens of prompts in equal chunks of c over S stages takes

    (T / c + S - 1) x (a + b c)

as the last stage starts S - 1 chunks late. Large chunks let the stages wait for each other, small ones read the
weights more often; the least is at c = sqrt(T a / (b (S - 1))). Chunks of less than a / (b (S - 1)) never gain: two of
them take longer than one of their sum.

- `_STEP_TOKENS` is a / b, the tokens whose arithmetic takes as long as the reading: ten or so on a core, some hundred
  on a GPU. The square root forgives errors: a value that is four times too large makes chunks twice as long, which
  costs a quarter more of the waiting. It is not measured, since how a prompt was cut may move the last bits of a sum,
  and a clock shall not decide about those.
- Chunks keep their size while a backlog shrinks. What is left at its end is dealt out over the steps in flight.
- Next tokens of running requests share a step with a chunk, and read the weights only once with it. Each step has as
  many of them as the others, so they make no step longer than the next.
- Attention makes later chunks of a prompt dearer: twice, where the context is so long that attention takes as much as
  all else. Chunks are not cut shorter for that: it costs S - 1 times what the dearest chunk is above the mean, with
  eight chunks a few percent.
"""

from collections import deque
from collections.abc import Callable
from math import ceil, sqrt

_STEP_TOKENS = 64


class PromptChunker:
    """Cuts prompts into chunks, by what is left of all prompts and what the last steps took."""

    def __init__(self, stages: int, budget: int) -> None:
        """`budget`: the most tokens in a step, which is also the size of a chunk where there is one stage."""
        self._stages = stages
        self._budget = budget
        self._least = ceil(_STEP_TOKENS / max(stages - 1, 1))
        self._last = 0
        self._recent: deque[int] = deque(maxlen=stages - 1)  # of the other steps in flight

    def share(self, count_backlog: Callable[[], int]) -> int:
        """Return how many prompt tokens the next step should have. The backlog is counted only where it matters."""
        if self._stages == 1:
            return self._budget
        backlog = count_backlog()
        even = ceil((backlog + sum(self._recent)) / self._stages)
        chunk = max(self._least, ceil(sqrt(backlog * _STEP_TOKENS / (self._stages - 1))), min(self._last, even))
        steps = max(ceil(backlog / min(chunk, self._budget)), 1)
        return ceil(backlog / steps)

    def cut(self, left: int, share: int) -> int:
        """Return how many of a prompt's `left` tokens go into a step that has `share` left for prompts.

        It may be more than `share`, so that no chunk is too small to be worth a step.
        """
        if share <= 0:
            return 0
        count = max(share, self._least)
        return count if left - count >= self._least else left

    def note_step(self, count: int) -> None:
        """Note that a step was planned with `count` prompt tokens."""
        self._recent.append(count)
        self._last = count or self._last
