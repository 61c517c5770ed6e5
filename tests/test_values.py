"""Tests of the text that shows a wrong value in a message: it is short, fast, and never fails."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.values import shown
from support.fakes import steady


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [[[]] * 5_000_000, {str(i): i for i in range(1_000_000)}, [[1] * 5_000_000], "a" * 50_000_000, 10**5000, deep(900)],
    ids=["lists", "names", "a list", "characters", "digits", "levels"],
)
def test_a_large_value_is_cut(value: Any) -> None:
    assert len(shown(value)) <= 300


def test_the_repr_of_a_large_value_is_not_computed() -> None:
    calls = 0

    class Part:
        def __repr__(self) -> str:
            nonlocal calls
            calls += 1
            return "part"

    assert shown([Part()] * 1_000_000).startswith("[part, part, ")
    assert calls < 1000


values = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@steady
@given(values)
def test_a_small_value_is_its_repr(value: Any) -> None:
    text = repr(value)
    assert shown(value) == (text if len(text) <= 200 else text[:200] + "...")
