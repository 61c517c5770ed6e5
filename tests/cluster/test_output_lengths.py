"""How long outputs are expected to become."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.routing.output_lengths import OutputLengths
from support.fakes import steady


@given(lengths=st.lists(st.integers(1, 5000), max_size=20), at=st.integers(0, 5000), allowed=st.integers(1, 5000))
@steady
def test_outputs_that_reach_their_limits_say_nothing(lengths: list[int], at: int, allowed: int) -> None:
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
def test_the_rest_is_within_what_is_allowed(seen: list[tuple[int, int, bool]], at: int, allowed: int) -> None:
    found = OutputLengths()
    for first, count, by_itself in seen:
        found.ended(first, first + count, by_itself)
    assert 1 <= found.rest(at, allowed) <= max(allowed, 1)
    assert found.rest(at, allowed) <= found.rest(at, allowed + 1)


def test_the_mean_is_found_beyond_what_limits_hide() -> None:
    """Exponentially distributed lengths with a mean of 200, of which those beyond their limits are cut."""
    found, rng = OutputLengths(), random.Random(0)
    for _ in range(3000):
        length, limit = round(rng.expovariate(1 / 200)) + 1, rng.choice([20, 100, 1000])
        found.ended(0, min(length, limit), by_itself=length < limit)
    assert found.rest(0, 100_000) == pytest.approx(200, rel=0.15)
    assert found.rest(300, 100_000) == pytest.approx(200, rel=0.25), "what has been drawn says nothing of the rest"


def test_lengths_that_hardly_differ_are_learned() -> None:
    found = OutputLengths()
    for _ in range(200):
        found.ended(0, 100, by_itself=True)
    assert found.rest(0, 4096) == pytest.approx(100, rel=0.15)
    assert found.rest(64, 4096) < 50


def test_what_was_long_ago_fades() -> None:
    found = OutputLengths()
    for length in (10, 1000):
        for _ in range(20_000):
            found.ended(0, length, by_itself=True)
    assert found.rest(0, 10_000) == pytest.approx(1000, rel=0.2)


def test_an_output_that_goes_on_elsewhere_counts_from_where_it_was() -> None:
    found = OutputLengths()
    for _ in range(100):
        found.ended(500, 510, by_itself=True)
    assert found.rest(500, 4096) < 30
