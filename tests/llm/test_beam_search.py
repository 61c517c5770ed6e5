"""Beam search, compared with a plain search over a made-up language."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shoal
from shoal.errors import RequestError
from shoal.llm.beam_search import beam_search
from shoal.outputs import BeamSearchOutput, BeamSearchSequence
from shoal.params import BeamSearchParams
from shoal.text.tokenizer import open_tokenizer
from support.fakes import steady

DEMO_MODEL = Path(shoal.__file__).parent / "demo_model"
LONG = 100
PROMPT = (7, 8)


class MadeUpLanguage:
    """A made-up distribution over the tokens 0 to size - 1. The next token depends on all tokens before it."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.batches: list[int] = []

    def logprobs(self, tokens: Sequence[int], temperature: float = 1.0) -> list[float]:
        drawn = random.Random(f"{self.seed} {tuple(tokens)}")
        logits = [drawn.gauss(0, 2) / temperature for _ in range(self.size)]
        total = math.log(sum(map(math.exp, logits)))
        return [logit - total for logit in logits]

    def __call__(self, sequences: Sequence[Sequence[int]], count: int) -> list[Mapping[int, float]]:
        self.batches.append(len(sequences))
        found: list[Mapping[int, float]] = []
        for tokens in sequences:
            all_of_them = enumerate(self.logprobs(tokens))
            kept = sorted(all_of_them, key=lambda each: -each[1])[: self.size if count == -1 else count]
            found.append(dict(kept))
        return found

    def search(
        self, params: BeamSearchParams, *prompts: tuple[int, ...], eos: Sequence[int] = ()
    ) -> list[BeamSearchOutput]:
        return beam_search(self, prompts or (PROMPT,), params, eos=eos, max_model_len=LONG, tokenizer=None)


Scored = list[tuple[tuple[int, ...], float]]


def plain_search(language: MadeUpLanguage, prompt: tuple[int, ...], params: BeamSearchParams, eos: set[int]) -> Scored:
    """Search with full sorting and without an early end, which is slow but easy to check by reading."""

    def score(each: tuple[tuple[int, ...], float]) -> float:
        tokens, logprob = each
        return float(logprob / (len(tokens) - (tokens[-1] in eos)) ** params.length_penalty)

    live: Scored = [(prompt, 0.0)]
    done: Scored = []
    for _ in range(params.max_tokens):
        grown: Scored = []
        for tokens, logprob in live:
            following = sorted(enumerate(language.logprobs(tokens, params.temperature or 1)), key=lambda each: -each[1])
            for token, more in following[: 2 * params.beam_width]:
                (done if token in eos else grown).append(((*tokens, token), logprob + more))
        live = sorted(grown, key=score, reverse=True)[: params.beam_width]
    return sorted(done + live, key=score, reverse=True)[: params.beam_width]


@steady
@given(
    seed=st.integers(0, 10**6),
    size=st.integers(2, 6),
    width=st.integers(1, 4),
    length=st.integers(1, 5),
    penalty=st.sampled_from([1.0, 0.0, 2.5, -1.0]),
    temperature=st.sampled_from([0.0, 1.0, 0.5, 3.0]),
    eos=st.sets(st.integers(0, 5), max_size=2),
)
def test_a_search_finds_the_sequences_of_a_plain_search(
    seed: int, size: int, width: int, length: int, penalty: float, temperature: float, eos: set[int]
) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=length, length_penalty=penalty, temperature=temperature)
    language = MadeUpLanguage(size, seed)
    [found] = language.search(params, eos=tuple(eos))
    expected = plain_search(language, PROMPT, params, eos)
    assert [each.tokens for each in found.sequences] == [tokens for tokens, _ in expected]
    # The two ways to apply the temperature differ only by rounding, on sums of five numbers below 100.
    assert [each.cum_logprob for each in found.sequences] == pytest.approx([p for _, p in expected], rel=1e-12)
    assert [each.finish_reason == "stop" for each in found.sequences] == [t[-1] in eos for t, _ in expected]


def test_a_wide_beam_finds_the_likeliest_of_all_sequences() -> None:
    size, length = 3, 3
    language = MadeUpLanguage(size, seed=5)
    [found] = language.search(BeamSearchParams(beam_width=size**length, max_tokens=length))
    expected = {}
    for output in itertools.product(range(size), repeat=length):
        steps = [language.logprobs(PROMPT + output[:i])[token] for i, token in enumerate(output)]
        expected[PROMPT + output] = sum(steps)
    ranked = sorted(expected, key=lambda tokens: -expected[tokens])
    assert [each.tokens for each in found.sequences] == ranked
    assert sum(math.exp(each.cum_logprob) for each in found.sequences) == pytest.approx(1, rel=1e-12)


def test_two_beams_find_a_sequence_that_greedy_misses() -> None:
    tree = {(): {0: 0.6, 1: 0.4}, (0,): {0: 0.5, 1: 0.5}, (1,): {0: 0.9, 1: 0.1}}

    def follow(sequences: Sequence[Sequence[int]], count: int) -> list[Mapping[int, float]]:
        return [{token: math.log(p) for token, p in tree[tuple(tokens[2:])].items()} for tokens in sequences]

    def best(width: int) -> tuple[int, ...]:
        params = BeamSearchParams(beam_width=width, max_tokens=2)
        [found] = beam_search(follow, [PROMPT], params, eos=(), max_model_len=LONG, tokenizer=None)
        return found.sequences[0].tokens[2:]

    assert best(1) == (0, 0)
    assert best(2) == (1, 0)


def test_prompts_share_their_batches_and_keep_their_order() -> None:
    language = MadeUpLanguage(5)
    params = BeamSearchParams(beam_width=3, max_tokens=4)
    together = language.search(params, (1,), (2, 3), (4,))
    assert language.batches == [3, 9, 9, 9]
    assert together == [MadeUpLanguage(5).search(params, prompt)[0] for prompt in ((1,), (2, 3), (4,))]


def test_with_ignore_eos_an_end_token_is_like_any_other() -> None:
    plain = MadeUpLanguage(4).search(BeamSearchParams(beam_width=2, max_tokens=4))
    ignored = MadeUpLanguage(4).search(BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True), eos=(0, 1))
    assert ignored == plain


def test_a_search_ends_when_no_beam_can_become_one_of_the_best() -> None:
    # After each token the end has a probability of 0.98, so a later end is always less likely than an earlier one.
    def follow(sequences: Sequence[Sequence[int]], count: int) -> list[Mapping[int, float]]:
        rounds.append(len(sequences))
        return [{0: math.log(0.98), 1: math.log(0.01), 2: math.log(0.01)} for _ in sequences]

    rounds: list[int] = []
    params = BeamSearchParams(beam_width=2, max_tokens=50, length_penalty=0)
    [found] = beam_search(follow, [PROMPT], params, eos=(0,), max_model_len=LONG, tokenizer=None)
    assert [each.tokens[2:] for each in found.sequences] == [(0,), (1, 0)]
    assert len(rounds) == 2


def test_beams_end_at_the_maximum_length() -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=50)
    [found] = beam_search(MadeUpLanguage(5), [(1, 2, 3)], params, eos=(), max_model_len=5, tokenizer=None)
    assert [(len(each.tokens), each.finish_reason) for each in found.sequences] == [(5, "length")] * 2


@pytest.mark.parametrize("prompt", [(), (1, 2, 3)])
def test_an_empty_or_full_prompt_is_refused(prompt: tuple[int, ...]) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=5)
    with pytest.raises(RequestError, match="prompt"):
        beam_search(MadeUpLanguage(5), [prompt], params, eos=(), max_model_len=3, tokenizer=None)


def test_impossible_tokens_are_never_chosen() -> None:
    def follow(sequences: Sequence[Sequence[int]], count: int) -> list[Mapping[int, float]]:
        return [{0: 0.0, 1: -math.inf} for _ in sequences]

    params = BeamSearchParams(beam_width=3, max_tokens=2)
    [found] = beam_search(follow, [PROMPT], params, eos=(), max_model_len=LONG, tokenizer=None)
    assert [each.tokens[2:] for each in found.sequences] == [(0, 0)]


def test_without_prompts_there_are_no_outputs() -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=2)
    assert beam_search(MadeUpLanguage(3), [], params, eos=(), max_model_len=LONG, tokenizer=None) == []


def test_the_text_has_neither_the_prompt_nor_the_end_token() -> None:
    tokenizer = open_tokenizer(DEMO_MODEL)
    assert tokenizer is not None
    prompt, output, end = tokenizer.encode("The fox"), tokenizer.encode(" ran", add_special_tokens=False), 1
    path = [*prompt, *output, end]

    def follow(sequences: Sequence[Sequence[int]], count: int) -> list[Mapping[int, float]]:
        return [{path[len(tokens)]: 0.0} for tokens in sequences]

    params = BeamSearchParams(beam_width=1, max_tokens=20)
    [found] = beam_search(follow, [tuple(prompt)], params, eos=(end,), max_model_len=LONG, tokenizer=tokenizer)
    assert found.sequences == (BeamSearchSequence(tuple(path), " ran", 0.0, "stop"),)
