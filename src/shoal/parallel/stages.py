"""The split of a model's layers into pipeline stages. This module is free of torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

# How many residual streams a stage may have sent before the next stage has received them. A stage that is further
# ahead waits. A larger number would gain nothing: about as many steps are in flight as there are stages.
MAX_PENDING_SENDS = 2


@dataclass(frozen=True, slots=True)
class Stage:
    """A contiguous range of a model's layers. The first stage also has the embedding, the last one norm and head."""

    number: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.count - 1


def make_stages(layers: Sequence[int]) -> tuple[Stage, ...]:
    """Return the stages of a model; `layers` has the number of layers of each stage."""
    ends = list(accumulate(layers))
    return tuple(
        Stage(number, len(ends), range(end - count, end))
        for number, (end, count) in enumerate(zip(ends, layers, strict=True))
    )


def balance_stages(
    costs: Sequence[float], count: int, *, first_extra: float = 0.0, last_extra: float = 0.0
) -> tuple[int, ...]:
    """Return the number of layers of each of `count` stages, such that the most expensive stage costs the least.

    costs: the cost of each layer; `first_extra` is added to the first stage, `last_extra` to the last one. Each stage
    has at least one layer, so `count` is at most the number of layers. Among equally good splits the least sum of
    squared stage costs wins, and then the split with more layers in the first stages.
    """
    sums = [0.0, *accumulate(costs)]

    def cost(number: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] + first_extra * (number == 0) + last_extra * (number == count - 1)

    def best(join: Callable[[float, float], float], limit: float) -> tuple[float, tuple[int, ...]]:
        """Return the least joined cost, and its split, of all splits in which no stage costs more than `limit`."""
        found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by the number of layers assigned so far
        for number in range(count):
            found = {
                stop: min(
                    (
                        (join(joined, cost(number, start, stop)), (*cut, stop - start))
                        for start, (joined, cut) in found.items()
                        if start < stop and cost(number, start, stop) <= limit
                    ),
                    key=lambda each: (each[0], [-layers for layers in each[1]]),
                )
                for stop in range(number + 1, len(costs) - (count - number - 1) + 1)
                if any(start < stop and cost(number, start, stop) <= limit for start in found)
            }
        return found[len(costs)]

    highest_cost, _ = best(max, math.inf)
    return best(lambda joined, each: joined + each * each, highest_cost)[1]
