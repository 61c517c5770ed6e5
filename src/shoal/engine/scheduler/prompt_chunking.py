"""The number of prompt tokens in a step, chosen so that all stages of a pipeline have work.

Stages work on batches that follow each other, so a stage waits if one batch takes longer than the next. A step takes
a + b x tokens on every stage: `a` is the time to read the weights, which does not depend on the number of tokens.
Computing T tokens of prompts in equal chunks of c over S stages takes

    (T / c + S - 1) x (a + b c)

since the last stage starts S - 1 chunks late. Large chunks make the stages wait for each other, small chunks read the
weights more often; the minimum is at c = sqrt(T a / (b (S - 1))). Chunks of less than a / (b (S - 1)) never pay: two of
them take longer than one chunk of twice the size.

- `_STEP_TOKENS` is a / b, the number of tokens whose arithmetic takes as long as reading the weights: about ten on a
  core, some hundred on a GPU. Because of the square root an error matters little: a value that is four times too large
  makes chunks twice as long, which makes the waiting a quarter longer. The value is not measured, since with
  PyTorch's attention the cut of a prompt may change the last bits of a sum, and these must not depend on a clock.
- Chunks keep their size while a backlog shrinks. The rest at its end is spread evenly over the steps in flight.
- Next tokens of running requests share a step with a chunk, so that the weights are read once for both. All steps have
  about the same number of such tokens, so they make no step longer than the next.
- Attention makes later chunks of a prompt slower: twice as slow if the context is so long that attention takes as much
  time as everything else. Chunks are not made shorter for that: it costs S - 1 times the difference between the slowest
  chunk and the mean, a few percent with eight chunks.
"""

from collections import deque
from collections.abc import Callable
from math import ceil, sqrt

_STEP_TOKENS = 64


class PromptChunker:
    """Cuts prompts into chunks. The size depends on the backlog of all prompts and on the chunks of the last steps."""

    def __init__(self, stages: int, budget: int) -> None:
        """Make a chunker for a pipeline of `stages`.

        Args:
            budget: the most tokens in a step; with one stage also the size of a chunk.
        """
        self._stages = stages
        self._budget = budget
        self._least = ceil(_STEP_TOKENS / max(stages - 1, 1))
        self._last = 0
        self._recent: deque[int] = deque(maxlen=stages - 1)  # prompt tokens of the other steps in flight

    def share(self, count_backlog: Callable[[], int]) -> int:
        """Return how many prompt tokens the next step should have. With one stage the backlog is not counted."""
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
