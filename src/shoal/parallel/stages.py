"""Which layers a pipeline stage has. Free of torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


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
    good cuts the one whose stages are nearest to each other is taken (least sum of squares).
    `count` is at most the number of layers.
    """
    sums = [0.0, *accumulate(costs)]
    whole = len(costs)

    def cost(number: int, start: int, stop: int) -> float:
        return sums[stop] - sums[start] + before * (number == 0) + behind * (number == count - 1)

    # best[stop]: (dearest stage, sum of squares, layers of each) for the stages so far over the layers before `stop`
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, 0.0, ())}
    for number in range(count):
        left = count - number - 1
        best = {
            stop: min(
                (max(most, cost(number, start, stop)), squares + cost(number, start, stop) ** 2, (*cut, stop - start))
                for start, (most, squares, cut) in best.items()
                if start < stop
            )
            for stop in range(number + 1, whole - left + 1)
        }
    return best[whole][2]
