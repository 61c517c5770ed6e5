"""JSON in pieces is the JSON that it would be in one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.http.json_encoding import EncodedList, bytes_of, pieces, size_of, text_of
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


@steady
@given(st.lists(VALUES, max_size=4), st.sampled_from([0, 1, 30, 700]))
def test_a_list_that_encodes_its_items_reads_as_any_other(items: list[Any], times: int) -> None:
    plain = items * times
    encoded, rest = EncodedList(), EncodedList()
    for item in plain[:1]:
        encoded.append(item)
    for item in plain[1:]:
        rest.append(item)
    encoded += rest
    assert len(encoded) == len(plain)
    for value in (lambda each: each, lambda each: {"a": [1, {"b": each}], "c": 1}):
        assert bytes_of(value(encoded)).decode() == text_of(value(plain))


def test_the_size_of_a_list_that_encodes_its_items_is_that_of_their_texts() -> None:
    encoded = EncodedList()
    encoded.append({"a": 1.5})
    encoded.append("bc")
    assert size_of({"x": encoded, "y": "z"}) == len('{"a":1.5}') + len('"bc"') + len("z")
