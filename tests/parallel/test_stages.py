from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.parallel.stages import balance_stages, make_stages
from support.fakes import steady

COSTS = st.lists(st.integers(1, 50).map(float), min_size=1, max_size=9)
END = st.integers(0, 200).map(float)


def test_stages_follow_each_other() -> None:
    first, middle, last = make_stages((3, 2, 2))
    assert (first.layers, middle.layers, last.layers) == (range(3), range(3, 5), range(5, 7))
    assert (first.first, first.last) == (True, False)
    assert (middle.first, middle.last) == (False, False)
    assert (last.first, last.last) == (False, True)
    assert [stage.number for stage in (first, middle, last)] == [0, 1, 2]


def test_one_stage_is_both_ends() -> None:
    (stage,) = make_stages((4,))
    assert stage.first
    assert stage.last


def stage_costs(costs: list[float], cut: tuple[int, ...], first_extra: float, last_extra: float) -> list[float]:
    found = [sum(costs[stage.layers.start : stage.layers.stop]) for stage in make_stages(cut)]
    found[0] += first_extra
    found[-1] += last_extra
    return found


def all_cuts(layers: int, count: int) -> list[tuple[int, ...]]:
    return [
        tuple(stop - start for start, stop in zip((0, *ends), (*ends, layers), strict=True))
        for ends in combinations(range(1, layers), count - 1)
    ]


@steady
@given(costs=COSTS, data=st.data(), first_extra=END, last_extra=END)
def test_no_split_is_more_even(costs: list[float], data: st.DataObject, first_extra: float, last_extra: float) -> None:
    """Compared with all splits, the most expensive stage costs the least, and then the sum of squares is the least."""
    count = data.draw(st.integers(1, len(costs)))
    cut = balance_stages(costs, count, first_extra=first_extra, last_extra=last_extra)
    assert sum(cut) == len(costs)
    assert len(cut) == count
    assert min(cut) >= 1
    merits = {
        each: (max(found), sum(cost**2 for cost in found))
        for each in all_cuts(len(costs), count)
        for found in [stage_costs(costs, each, first_extra, last_extra)]
    }
    assert merits[cut] == min(merits.values())


@pytest.mark.parametrize(
    ("layers", "count", "last_extra", "cut"),
    [
        (7, 3, 0.0, (3, 2, 2)),
        (7, 3, 1.0, (3, 3, 1)),
        (7, 3, 2.0, (3, 3, 1)),  # a head that costs as much as two layers
        (8, 2, 2.0, (5, 3)),
        (3, 3, 100.0, (1, 1, 1)),
    ],
)
def test_a_head_weighs_on_the_last_stage(layers: int, count: int, last_extra: float, cut: tuple[int, ...]) -> None:
    assert balance_stages([1.0] * layers, count, last_extra=last_extra) == cut
