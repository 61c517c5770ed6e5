"""The state of a grammar: masks, drafts, ends, and errors."""

import random
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits
from tokenizers import Tokenizer

import shoal
from shoal.errors import EngineError, RequestError
from shoal.structured.matcher import PARSER_LIMITS, GrammarState, Vocabulary, mask_words
from shoal.wire.base import Ids
from support.fakes import steady

TOKENIZER = (Path(shoal.__file__).parent / "demo_model" / "tokenizer.json").read_text("utf-8")
SIZE = 640
EOS = (1, 5)
A, B, C = (int(Tokenizer.from_str(TOKENIZER).token_to_id(letter) or 0) for letter in "abc")
WORD_BYTES = 4


def vocabulary(eos: Ids = EOS, vocab_size: int = SIZE) -> Vocabulary:
    return Vocabulary(TOKENIZER, eos, vocab_size)


@cache
def shared() -> Vocabulary:
    return vocabulary()


def of_regex(pattern: str, source: Vocabulary | None = None, limits: LLParserLimits = PARSER_LIMITS) -> GrammarState:
    return GrammarState.compile(LLMatcher.grammar_from_regex(pattern), source or shared(), limits)


def rows(grammar: GrammarState, drafts: Ids = (), words: int = SIZE // 32) -> list[set[int]]:
    parts = [place.row for place in grammar.allowed_tokens(drafts)]
    assert [len(part) for part in parts] == [words * WORD_BYTES] * (1 + len(drafts))
    return [{token for token in range(words * 32) if part[token // 8] >> token % 8 & 1} for part in parts]


def ends(grammar: GrammarState, drafts: Ids = ()) -> list[bool]:
    return [place.ended for place in grammar.allowed_tokens(drafts)]


@cache
def texts() -> dict[int, str]:
    """Return the text of each token that decodes to ASCII characters."""
    tokenizer = Tokenizer.from_str(TOKENIZER)
    return {i: tokenizer.decode([i]) for i in range(SIZE) if tokenizer.decode([i]).isascii() and tokenizer.decode([i])}


def test_the_first_mask_has_the_tokens_that_begin_a_matching_text() -> None:
    [first] = rows(of_regex("ab*c"))
    assert first == {i for i, text in texts().items() if re.fullmatch("ab*c?", text)}
    assert A in first


def test_every_end_of_text_token_is_allowed_where_the_grammar_accepts() -> None:
    grammar = of_regex("ab*")
    assert not rows(grammar)[0] & {*EOS}
    grammar.accept((A,))
    assert rows(grammar)[0] >= {*EOS, B}
    assert not grammar.ended


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_the_tokens_of_a_begun_output_are_taken_in_one_call(count: int) -> None:
    """The state is the same as after taking the tokens one by one, with a mask computed before each."""
    output = (A, B, B, EOS[0])[:count]
    stepwise, resumed = of_regex("ab*"), of_regex("ab*")
    for token in output:
        stepwise.allowed_tokens(())
        stepwise.accept((token,))
    assert resumed.count_valid(output) == count
    resumed.accept(output)
    assert resumed.allowed_tokens((B,)) == stepwise.allowed_tokens((B,))
    assert resumed.ended == stepwise.ended == (count == 4)


def test_after_a_complete_text_only_end_of_text_tokens_are_allowed() -> None:
    grammar = of_regex("ab")
    grammar.accept((A, B))
    assert grammar.ended
    assert rows(grammar) == [{*EOS}]


@pytest.mark.parametrize("end", EOS)
def test_no_token_may_follow_an_end_of_text_token(end: int) -> None:
    grammar = of_regex("ab*")
    grammar.accept((A, end))
    assert grammar.ended
    assert grammar.count_valid((B,)) == grammar.count_valid((end,)) == 0
    assert rows(grammar, (end,)) == [{*EOS}, {*EOS}]


def test_masks_after_drafts_leave_the_state_unchanged() -> None:
    grammar = of_regex("ab*c")
    drafted = rows(grammar, (A, B, C))
    assert drafted[3] == {*EOS}
    assert ends(grammar, (A, B, C)) == [False, False, False, True]
    for token, row in zip((A, B, C), drafted, strict=False):
        assert rows(grammar) == [row]
        grammar.accept((token,))
    assert grammar.ended


@pytest.mark.parametrize(
    ("drafts", "valid"),
    [
        ((), 0),
        ((A, B, C), 3),
        ((A, A), 1),
        ((C,), 0),
        ((A, 1), 1),
        ((A, C, 5), 3),
        ((A, C, 5, 1), 3),
        ((A, B, SIZE), 2),
    ],
)
def test_drafts_are_valid_up_to_the_first_forbidden_draft(drafts: Ids, valid: int) -> None:
    grammar = of_regex("ab*c")
    assert grammar.count_valid(drafts) == valid
    rows(grammar, drafts)
    assert grammar.count_valid(drafts) == valid  # the state is unchanged


@pytest.mark.parametrize("tokens", [(C,), (A, A), (1,), (A, 5), (SIZE,), (A, C, A), (A, C, 1, 5)])
def test_a_forbidden_token_is_an_error_and_changes_nothing(tokens: Ids) -> None:
    grammar = of_regex("ab*c")
    before = rows(grammar)
    with pytest.raises(EngineError, match=f"token {tokens[-1]} "):
        grammar.accept(tokens)
    assert rows(grammar) == before


def test_a_model_without_end_of_text_tokens_ends_when_no_token_may_follow() -> None:
    grammar = of_regex("ab?", vocabulary(eos=()))
    assert not rows(grammar)[0] & {*EOS}
    grammar.accept((A,))
    assert not grammar.ended
    assert rows(grammar) == [{B}]
    grammar.accept((B,))
    assert grammar.ended
    assert rows(grammar)[0]  # a row is never empty; a token that is drawn after the end is dropped


def test_an_end_of_text_token_that_also_has_text_is_allowed_only_at_the_end() -> None:
    grammar = of_regex("a(b|c)", vocabulary(eos=(B,)))
    grammar.accept((A,))
    assert rows(grammar) == [{C}]
    grammar.accept((C,))
    assert rows(grammar) == [{B}]


def test_a_dead_end_is_reported_only_when_it_is_reached() -> None:
    grammar = of_regex("abca", vocabulary(eos=(B,)))
    assert rows(grammar, (A,)) == [{A}, {B}]
    assert not grammar.problem
    grammar.accept((A,))
    assert rows(grammar) == [{B}]  # a row is never empty
    assert "no token of the model may follow" in grammar.problem
    assert grammar.ended
    grammar.accept((B,))
    assert grammar.count_valid((C,)) == 0


def test_a_grammar_that_takes_too_long_is_reported_as_a_problem() -> None:
    # This limit is enough to find the first token of this grammar, but not its later ones.
    limits = LLParserLimits(step_lexer_fuel=500, verbose_errors=False)
    grammar = of_regex("(a|b)*a(a|b){99}c", limits=limits)
    drawn = random.Random(0)
    while not grammar.ended:
        grammar.accept((drawn.choice(sorted(rows(grammar)[0])),))
    assert grammar.problem
    assert grammar.ended
    assert rows(grammar, (A, B)) == [{*EOS}] * 3


@pytest.mark.parametrize("vocab_size", [SIZE + 1, SIZE + 31, SIZE + 33, 4 * SIZE])
def test_tokens_beyond_the_tokenizer_are_never_allowed(vocab_size: int) -> None:
    grammar = of_regex("(a|b|\n)*", vocabulary(vocab_size=vocab_size))
    assert rows(grammar, words=mask_words(vocab_size)) == rows(of_regex("(a|b|\n)*"))


def test_a_model_with_fewer_tokens_than_its_tokenizer_has_smaller_rows() -> None:
    source = vocabulary(vocab_size=100)
    assert rows(of_regex("[a-z ]*", source), words=4)[0] == {i for i in rows(of_regex("[a-z ]*"))[0] if i < 100}


def test_a_text_that_no_tokens_of_the_model_spell_is_refused() -> None:
    with pytest.raises(RequestError, match="no token of the model"):
        of_regex("a", vocabulary(vocab_size=A))


def test_an_end_of_text_token_beyond_the_vocabulary_is_ignored() -> None:
    assert rows(of_regex("a*", vocabulary(eos=(1, 9999))))[0] & {1, 9999} == {1}


def test_copies_are_independent() -> None:
    first = of_regex("ab")
    second = first.copy()
    first.accept((A,))
    assert rows(second) == rows(of_regex("ab")) != rows(first)


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"vocab": {}}}', "[]"])
def test_an_unreadable_tokenizer_is_an_error(text: str) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        Vocabulary(text, EOS, SIZE)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (LLMatcher.grammar_from_regex("[a"), "unclosed character class"),
        (LLMatcher.grammar_from_regex(r"[^\s\S]"), "no text satisfies it"),
        (LLMatcher.grammar_from_json_schema("false"), "no text satisfies the schema: schema is false"),
        (LLMatcher.grammar_from_json_schema('{"if": {}}'), "unsupported keywords"),
        (LLMatcher.grammar_from_lark("start: nothing"), "nothing"),
    ],
)
def test_an_unusable_grammar_is_refused_in_one_line(grammar: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        GrammarState.compile(grammar, shared())
    assert str(caught.value).startswith("structured_outputs ")
    assert "\n" not in str(caught.value)


PATTERNS = ["[ab]*c", "(ab|ba){2,3}", "a+(b|c)?", "[a-c ]{0,5}", '"[^"]*"', "(the|cat| sat)+"]


@steady
@given(st.sampled_from(PATTERNS), st.randoms(use_true_random=False), st.integers(1, 12))
def test_texts_drawn_from_masks_match(pattern: str, drawn: random.Random, most: int) -> None:
    """If tokens are drawn at random from the masks until an end-of-text token, their text always matches."""
    grammar, text = of_regex(pattern), ""
    for _ in range(most):
        [allowed] = rows(grammar)
        token = drawn.choice(sorted(allowed & {*texts(), *EOS}))
        grammar.accept((token,))
        if token in EOS:
            assert re.fullmatch(pattern, text)
            break
        text += texts()[token]
        if grammar.ended:
            assert re.fullmatch(pattern, text)
