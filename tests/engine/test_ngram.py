import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.ngram import NgramIndex
from support.fakes import steady


def index(text: str, longest: int = 3, shortest: int = 1) -> NgramIndex:
    found = NgramIndex(longest, shortest)
    found.extend([ord(char) for char in text])
    return found


def proposed(text: str, count: int, longest: int = 3, shortest: int = 1) -> str:
    return "".join(map(chr, index(text, longest, shortest).propose(count)))


def test_the_tokens_after_the_last_occurrence_are_proposed() -> None:
    assert proposed("the cat sat; the ", 3) == "cat"


def test_the_longest_match_wins_over_a_later_one() -> None:
    assert proposed("abcX cY abc", 1) == "X"


def test_the_latest_match_wins() -> None:
    assert proposed("abX abY ab", 1) == "Y"


def test_ngrams_below_the_shortest_length_do_not_match() -> None:
    assert proposed("abXb", 2, shortest=2) == ""
    assert proposed("abXab", 1, shortest=2) == "X"


def test_a_repeating_text_is_continued() -> None:
    assert proposed("xabab", 5) == "ababa"
    assert proposed("aa", 4) == "aaaa"


@pytest.mark.parametrize("text", ["", "a", "ab", "abc"])
def test_nothing_is_proposed_without_an_earlier_occurrence(text: str) -> None:
    assert proposed(text, 5) == ""


def test_a_count_of_zero_proposes_nothing() -> None:
    assert proposed("aaaa", 0) == ""


@pytest.mark.parametrize(("longest", "shortest"), [(1, 2), (0, 0), (3, 0)])
def test_lengths_must_be_in_order(longest: int, shortest: int) -> None:
    with pytest.raises(ValueError, match="1 <= shortest <= longest must hold"):
        NgramIndex(longest, shortest)


def search(tokens: list[int], count: int, longest: int, shortest: int) -> list[int]:
    """Propose tokens by the definition: look at every position, latest first, and copy from there."""
    for length in range(longest, shortest - 1, -1):
        suffix = tokens[len(tokens) - length :]
        for start in range(len(tokens) - length - 1, -1, -1):
            if len(suffix) == length and tokens[start : start + length] == suffix:
                text = list(tokens)
                for i in range(count):
                    text.append(text[start + length + i])
                return text[len(tokens) :]
    return []


@steady
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6),
    st.integers(0, 6),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_the_index_agrees_with_a_plain_search(parts: list[list[int]], count: int, shortest: int, more: int) -> None:
    found, tokens = NgramIndex(shortest + more, shortest), list[int]()
    for part in parts:
        found.extend(part)
        tokens += part
        assert list(found.propose(count)) == search(tokens, count, shortest + more, shortest)
