from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.parallel.stages import cut_evenly, stages
from support.fakes import steady

COSTS = st.lists(st.integers(1, 50).map(float), min_size=1, max_size=9)
END = st.integers(0, 200).map(float)


def test_stages_follow_each_other() -> None:
    first, middle, last = stages((3, 2, 2))
    assert (first.layers, middle.layers, last.layers) == (range(3), range(3, 5), range(5, 7))
    assert (first.first, first.last) == (True, False)
    assert (middle.first, middle.last) == (False, False)
    assert (last.first, last.last) == (False, True)
    assert [stage.number for stage in (first, middle, last)] == [0, 1, 2]


def test_one_stage_is_both_ends() -> None:
    (stage,) = stages((4,))
    assert stage.first
    assert stage.last


def stage_costs(costs: list[float], cut: tuple[int, ...], before: float, behind: float) -> list[float]:
    found = [sum(costs[stage.layers.start : stage.layers.stop]) for stage in stages(cut)]
    found[0] += before
    found[-1] += behind
    return found


def all_cuts(layers: int, count: int) -> list[tuple[int, ...]]:
    return [
        tuple(stop - start for start, stop in zip((0, *ends), (*ends, layers), strict=True))
        for ends in combinations(range(1, layers), count - 1)
    ]


@steady
@given(costs=COSTS, data=st.data(), before=END, behind=END)
def test_no_cut_is_more_even(costs: list[float], data: st.DataObject, before: float, behind: float) -> None:
    """Against all of them: the dearest stage is as cheap as can be, and of such cuts the stages are the most alike."""
    count = data.draw(st.integers(1, len(costs)))
    cut = cut_evenly(costs, count, before=before, behind=behind)
    assert sum(cut) == len(costs)
    assert len(cut) == count
    assert min(cut) >= 1
    merits = {
        each: (max(found), sum(cost**2 for cost in found))
        for each in all_cuts(len(costs), count)
        for found in [stage_costs(costs, each, before, behind)]
    }
    assert merits[cut] == min(merits.values())


@pytest.mark.parametrize(
    ("layers", "count", "behind", "cut"),
    [
        (7, 3, 0.0, (3, 2, 2)),
        (7, 3, 1.0, (3, 3, 1)),
        (7, 3, 2.0, (3, 3, 1)),  # a head as dear as two layers
        (8, 2, 2.0, (5, 3)),
        (3, 3, 100.0, (1, 1, 1)),
    ],
)
def test_a_head_weighs_on_the_last_stage(layers: int, count: int, behind: float, cut: tuple[int, ...]) -> None:
    assert cut_evenly([1.0] * layers, count, behind=behind) == cut
