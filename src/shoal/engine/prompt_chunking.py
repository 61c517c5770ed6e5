"""How many tokens of prompts go into a step, so that all stages of a pipeline have work.

Stages work on batches that follow each other, so a stage waits where one batch takes longer than the next. A step
takes a + b x tokens on every stage: `a` is for reading the weights, whatever is computed with them. Computing T
tokens of prompts in equal chunks of c over S stages takes

    (T / c + S - 1) x (a + b c)

as the last stage starts S - 1 chunks late. Large chunks let the stages wait for each other, small ones read the
weights more often; the least is at c = sqrt(T a / (b (S - 1))). Chunks of less than a / (b (S - 1)) never gain: two of
them take longer than one of both.

- `_STEP_TOKENS` is a / b, the tokens whose arithmetic takes as long as the reading: ten or so on a core, some hundred
  on a GPU. The square root forgives a wrong one: what is four times too large makes chunks twice as long, which costs
  a quarter more of the waiting. It is not measured, since how a prompt was cut may move the last bits of a sum, and a
  clock shall not decide about those.
- Chunks keep their size while a backlog shrinks. What is left at its end is dealt out over the steps in flight.
- Next tokens of running requests share a step with a chunk, and read the weights only once with it. Each step has as
  many of them as the others, so they make no step longer than the next.
- Attention makes later chunks of a prompt dearer: twice, where the context is so long that attention takes as much as
  all else. Chunks are not cut shorter for that. What counts is by how much the dearest is above the mean, S - 1 times
  in all: with eight chunks a few percent.
"""

from collections import deque
from collections.abc import Callable
from math import ceil, sqrt

_STEP_TOKENS = 64


class PromptSpread:
    """Remembers what the last steps took of prompts."""

    def __init__(self, stages: int, budget: int) -> None:
        """At most `budget` tokens a step, and as many as there are if there is one stage."""
        self._stages = stages
        self._budget = budget
        self._least = ceil(_STEP_TOKENS / max(stages - 1, 1))
        self._last = 0
        self._recent: deque[int] = deque(maxlen=stages - 1)  # of the other steps in flight

    def share(self, count_backlog: Callable[[], int]) -> int:
        """Tokens for the next step, of those that are left in prompts. They are counted if that matters."""
        if self._stages == 1:
            return self._budget
        backlog = count_backlog()
        even = ceil((backlog + sum(self._recent)) / self._stages)
        chunk = max(self._least, ceil(sqrt(backlog * _STEP_TOKENS / (self._stages - 1))), min(self._last, even))
        steps = max(ceil(backlog / min(chunk, self._budget)), 1)
        return ceil(backlog / steps)

    def cut(self, left: int, share: int) -> int:
        """Tokens of a prompt that go into a step whose prompts have `share` left, which this may overdraw: a prompt
        is not cut into crumbs."""
        if share <= 0:
            return 0
        count = max(share, self._least)
        return count if left - count >= self._least else left

    def took(self, count: int) -> None:
        """A step was made with `count` tokens of prompts."""
        self._recent.append(count)
        self._last = count or self._last
