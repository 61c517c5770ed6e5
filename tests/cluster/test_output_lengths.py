"""The expected lengths of outputs."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.routing.output_lengths import OutputLengths
from support.fakes import steady


@given(lengths=st.lists(st.integers(1, 5000), max_size=20), at=st.integers(0, 5000), allowed=st.integers(1, 5000))
@steady
def test_outputs_that_reach_their_limits_teach_nothing(lengths: list[int], at: int, allowed: int) -> None:
    found = OutputLengths()
    for length in lengths:
        found.ended(0, length, by_itself=False)
    assert found.rest(at, allowed) == allowed


@given(
    seen=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000), st.booleans()), max_size=40),
    at=st.integers(0, 5000),
    allowed=st.integers(0, 100_000),
)
@steady
def test_the_expected_rest_is_within_the_limit(seen: list[tuple[int, int, bool]], at: int, allowed: int) -> None:
    found = OutputLengths()
    for first, count, by_itself in seen:
        found.ended(first, first + count, by_itself)
    assert 1 <= found.rest(at, allowed) <= max(allowed, 1)
    assert found.rest(at, allowed) <= found.rest(at, allowed + 1)


def test_the_mean_is_found_although_limits_cut_outputs() -> None:
    """The lengths are exponentially distributed with a mean of 200, and cut at the limits."""
    found, rng = OutputLengths(), random.Random(0)
    for _ in range(3000):
        length, limit = round(rng.expovariate(1 / 200)) + 1, rng.choice([20, 100, 1000])
        found.ended(0, min(length, limit), by_itself=length < limit)
    assert found.rest(0, 100_000) == pytest.approx(200, rel=0.15)
    assert found.rest(300, 100_000) == pytest.approx(200, rel=0.25), "the tokens so far do not change the expected rest"


def test_lengths_that_hardly_differ_are_learned() -> None:
    found = OutputLengths()
    for _ in range(200):
        found.ended(0, 100, by_itself=True)
    assert found.rest(0, 4096) == pytest.approx(100, rel=0.15)
    assert found.rest(64, 4096) < 50


def test_old_outputs_are_forgotten_slowly() -> None:
    found = OutputLengths()
    for length in (10, 1000):
        for _ in range(20_000):
            found.ended(0, length, by_itself=True)
    assert found.rest(0, 10_000) == pytest.approx(1000, rel=0.2)


def test_a_continued_output_counts_from_where_it_continues() -> None:
    found = OutputLengths()
    for _ in range(100):
        found.ended(500, 510, by_itself=True)
    assert found.rest(500, 4096) < 30
