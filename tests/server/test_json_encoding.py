"""JSON that is written in pieces is the same as JSON that is written at once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.server.http.json_encoding import EncodedList, json_bytes, json_pieces, json_text, text_length
from support.fakes import steady

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
)


def grown(value: Any, times: int) -> Any:
    """Return a longer list or object of the same items."""
    if isinstance(value, list):
        return value * times
    if isinstance(value, dict):
        return {f"{key}{i}": each for i in range(times) for key, each in value.items()}
    return value


@steady
@given(VALUES, st.sampled_from([1, 30, 700]))
def test_the_joined_pieces_are_the_whole_text(value: Any, times: int) -> None:
    large = grown(value, times)
    assert "".join(json_pieces(large)) == json_text(large)


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
def test_pieces_of_a_large_value_are_short(value: Any) -> None:
    found = list(json_pieces(value))
    assert max(map(len, found)) < 100_000
    assert "".join(found) == json_text(value)


def test_half_a_surrogate_pair_becomes_a_question_mark() -> None:
    assert json_bytes({"a": ["\ud800"] * 5000}).count(b"?") == 5000


@steady
@given(st.lists(VALUES, max_size=4), st.sampled_from([0, 1, 30, 700]))
def test_an_encoded_list_has_the_json_of_a_list(items: list[Any], times: int) -> None:
    plain = items * times
    encoded, rest = EncodedList(), EncodedList()
    for item in plain[:1]:
        encoded.append(item)
    for item in plain[1:]:
        rest.append(item)
    encoded += rest
    assert len(encoded) == len(plain)
    for value in (lambda each: each, lambda each: {"a": [1, {"b": each}], "c": 1}):
        assert json_bytes(value(encoded)).decode() == json_text(value(plain))


def test_the_size_of_an_encoded_list_is_the_size_of_its_texts() -> None:
    encoded = EncodedList()
    encoded.append({"a": 1.5})
    encoded.append("bc")
    assert text_length({"x": encoded, "y": "z"}) == len('{"a":1.5}') + len('"bc"') + len("z")
