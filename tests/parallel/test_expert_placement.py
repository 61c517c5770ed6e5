from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.parallel.expert_placement import place_experts
from support.fakes import steady

Strategy = Literal["linear", "round_robin"]


@pytest.mark.parametrize(
    ("strategy", "first", "last"),
    [("linear", (0, 1, 2, 3, 4, 5), (11, 12, 13, 14, 15)), ("round_robin", (0, 3, 6, 9, 12, 15), (2, 5, 8, 11, 14))],
)
def test_sixteen_experts_over_three_ranks(strategy: Strategy, first: tuple[int, ...], last: tuple[int, ...]) -> None:
    placed = place_experts(16, 3, strategy)
    assert (placed[0], placed[2]) == (first, last)


@steady
@given(experts=st.integers(1, 70), ranks=st.integers(1, 80), strategy=st.sampled_from(["linear", "round_robin"]))
def test_each_expert_is_on_one_rank_and_shares_are_even(experts: int, ranks: int, strategy: Strategy) -> None:
    placed = place_experts(experts, ranks, strategy)
    assert len(placed) == ranks
    assert sorted(expert for share in placed for expert in share) == list(range(experts))
    assert all(list(share) == sorted(share) for share in placed)
    sizes = [len(share) for share in placed]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)  # ranks without one come last
