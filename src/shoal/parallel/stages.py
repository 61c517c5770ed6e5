"""Which layers a pipeline stage has. Free of torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

# Residual streams of steps that a stage has sent and keeps, since the next one may not have taken them: a stage that is
# further ahead waits. More would only stand in a queue, as there are about as many steps in flight as stages.
STREAMS_ON_WAY = 2


@dataclass(frozen=True, slots=True)
class Stage:
    """Contiguous layers of a model; the first stage has the embedding too, the last one norm and head."""

    number: int
    count: int
    layers: range

    @property
    def first(self) -> bool:
        return self.number == 0

    @property
    def last(self) -> bool:
        return self.number == self.count - 1


def stages(layers: Sequence[int]) -> tuple[Stage, ...]:
    """`layers`: how many each stage has."""
    ends = list(accumulate(layers))
    return tuple(
        Stage(number, len(ends), range(end - count, end))
        for number, (end, count) in enumerate(zip(ends, layers, strict=True))
    )


def cut_evenly(costs: Sequence[float], count: int, *, before: float = 0.0, behind: float = 0.0) -> tuple[int, ...]:
    """Layers of each stage, at least one, so that the dearest stage is as cheap as can be.

    costs: of each layer; `before` is what the first stage computes besides, `behind` what the last one does. Of equally
    good cuts the one whose stages are nearest to each other is taken (least sum of squares), and of these the one whose
    first stages have more layers.
    `count` is at most the number of layers.
    """
    sums = [0.0, *accumulate(costs)]

    def cost(number: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] + before * (number == 0) + behind * (number == count - 1)

    def best(join: Callable[[float, float], float], most: float) -> tuple[float, tuple[int, ...]]:
        """Of the cuts with no stage dearer than `most`, the one whose costs, joined, are least; and that sum."""
        found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by how many layers the stages so far have
        for number in range(count):
            found = {
                stop: min(
                    (
                        (join(joined, cost(number, start, stop)), (*cut, stop - start))
                        for start, (joined, cut) in found.items()
                        if start < stop and cost(number, start, stop) <= most
                    ),
                    key=lambda each: (each[0], [-layers for layers in each[1]]),
                )
                for stop in range(number + 1, len(costs) - (count - number - 1) + 1)
                if any(start < stop and cost(number, start, stop) <= most for start in found)
            }
        return found[len(costs)]

    dearest, _ = best(max, math.inf)
    return best(lambda joined, each: joined + each * each, dearest)[1]
