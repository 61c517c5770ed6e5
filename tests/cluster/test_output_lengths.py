"""The estimate of how many more tokens an output will get."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.routing.output_lengths import OutputLengths
from support.fakes import steady


@given(cut=st.lists(st.integers(1, 5000), max_size=20), at=st.integers(0, 5000), allowed=st.integers(1, 5000))
@steady
def test_outputs_that_reach_their_limits_teach_nothing(cut: list[int], at: int, allowed: int) -> None:
    lengths = OutputLengths()
    for length in cut:
        lengths.ended(0, length, by_itself=False)
    assert lengths.expected_rest(at, allowed) == allowed


@given(
    seen=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000), st.booleans()), max_size=40),
    at=st.integers(0, 5000),
    allowed=st.integers(0, 100_000),
)
@steady
def test_the_expected_rest_is_at_most_what_is_allowed(seen: list[tuple[int, int, bool]], at: int, allowed: int) -> None:
    lengths = OutputLengths()
    for first, count, by_itself in seen:
        lengths.ended(first, first + count, by_itself)
    assert 1 <= lengths.expected_rest(at, allowed) <= max(allowed, 1)
    assert lengths.expected_rest(at, allowed) <= lengths.expected_rest(at, allowed + 1)


def test_the_mean_is_found_although_limits_cut_outputs() -> None:
    """Learn from exponentially distributed lengths with a mean of 200, cut at limits."""
    lengths, rng = OutputLengths(), random.Random(0)
    for _ in range(3000):
        length, limit = round(rng.expovariate(1 / 200)) + 1, rng.choice([20, 100, 1000])
        lengths.ended(0, min(length, limit), by_itself=length < limit)
    assert lengths.expected_rest(0, 100_000) == pytest.approx(200, rel=0.15)
    assert lengths.expected_rest(300, 100_000) == pytest.approx(200, rel=0.25), (
        "the rest does not depend on the length so far"
    )


def test_lengths_that_hardly_differ_are_learned() -> None:
    lengths = OutputLengths()
    for _ in range(200):
        lengths.ended(0, 100, by_itself=True)
    assert lengths.expected_rest(0, 4096) == pytest.approx(100, rel=0.15)
    assert lengths.expected_rest(64, 4096) < 50


def test_old_outputs_count_less() -> None:
    lengths = OutputLengths()
    for length in (10, 1000):
        for _ in range(20_000):
            lengths.ended(0, length, by_itself=True)
    assert lengths.expected_rest(0, 10_000) == pytest.approx(1000, rel=0.2)


def test_an_output_counts_from_the_length_at_which_it_was_continued() -> None:
    lengths = OutputLengths()
    for _ in range(100):
        lengths.ended(500, 510, by_itself=True)
    assert lengths.expected_rest(500, 4096) < 30
