"""JSON in pieces is the JSON that it would be in one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.encoding import bytes_of, pieces, text_of
from support.fakes import steady

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
)


def grown(value: Any, times: int) -> Any:
    """A longer list or object of the same."""
    if isinstance(value, list):
        return value * times
    if isinstance(value, dict):
        return {f"{key}{i}": each for i in range(times) for key, each in value.items()}
    return value


@steady
@given(VALUES, st.sampled_from([1, 30, 700]))
def test_pieces_make_up_the_text(value: Any, times: int) -> None:
    large = grown(value, times)
    assert "".join(pieces(large)) == text_of(large)


@pytest.mark.parametrize(
    "value",
    [
        list(range(100_000)),
        {str(i): i for i in range(100_000)},
        {"choices": [{"logprobs": {"tokens": ["a"] * 50_000, "top": [{"a": 1.0, "b": 2.0}] * 20_000}}] * 3},
        [["x" * 100] * 300] * 300,
        tuple([1.5] * 10_000),
    ],
)
def test_pieces_of_what_is_large_are_short(value: Any) -> None:
    found = list(pieces(value))
    assert max(map(len, found)) < 100_000
    assert "".join(found) == text_of(value)


def test_halves_of_a_pair_become_question_marks() -> None:
    assert bytes_of({"a": ["\ud800"] * 5000}).count(b"?") == 5000
