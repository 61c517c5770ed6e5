"""Deltas add up to the output without streaming, for all texts, tokenizers and sizes of updates."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.launch.hub import BUNDLED
from shoal.llm.deltas import Delta
from shoal.llm.outputs import PromptOutputs
from shoal.outputs import CompletionOutput
from shoal.params import SamplingParams
from shoal.text.prompts import Job
from shoal.text.tokenizer import FastTokenizer, Tokenizer, open_tokenizer
from shoal.wire.engine import Finish, SeqUpdate
from shoal.wire.ranks import TokenLogprobs
from support import tokenizers as made
from support.fakes import steady

KINDS = {"bundled": 512, "byte_level": 360, "byte_fallback": 273, "metaspace": 8, "word_pieces": 8, "odd_fallback": 273}
TEXTS = [
    "naïve café",
    "🦊🐕👩‍👩‍👧‍👦",
    "e\u0301\u0323o\u0308",
    "שלום עולם",
    "مرحبا",
    "日本語の",
    "a\u200db",
    "end.\n\n",
    "the fox",
]
END = 2  # an end-of-text token


@cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "bundled":
        found = open_tokenizer(BUNDLED)
        assert found is not None
        return found
    return FastTokenizer(getattr(made, kind)())


@st.composite
def hard_tokens(draw: st.DrawFn, kind: str) -> list[int]:
    """Draw tokens of difficult texts, cut at any place, mixed with random tokens."""
    tokens: list[int] = []
    for _ in range(draw(st.integers(1, 4))):
        piece = tokenizer(kind).encode(draw(st.sampled_from(TEXTS)), add_special_tokens=False)
        start = draw(st.integers(0, len(piece)))
        tokens += piece[start : start + draw(st.integers(1, 12))]
        tokens += draw(st.lists(st.integers(0, KINDS[kind] - 1), max_size=3))
    return [token for token in tokens if token < KINDS[kind]] or [3]


@st.composite
def parameters(draw: st.DrawFn, text: str) -> SamplingParams:
    """Draw parameters with stop texts that occur in the text, only begin to occur, or do not occur."""
    stops = []
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, max(len(text) - 1, 0)))
        found = text[start : start + draw(st.integers(1, 5))]
        stops.append(found + draw(st.sampled_from(["", "", "", "x"])) or "zzz")
    return SamplingParams(
        stop=stops or None,
        include_stop_str_in_output=draw(st.booleans()),
        skip_special_tokens=draw(st.booleans()),
        min_tokens=draw(st.integers(0, 4)),
        max_tokens=100,
        logprobs=draw(st.sampled_from([None, 0, 1])),
        detokenize=draw(st.sampled_from([True, True, True, False])) or bool(stops),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([None, [5]])),
    )


def entry(position: int, token: int) -> TokenLogprobs:
    return TokenLogprobs(-float(position), 1, (token,), (-float(position),))


def begin(kind: str, params: SamplingParams, prompt: Sequence[int]) -> PromptOutputs:
    job = Job(0, None, tuple(prompt), params)
    return PromptOutputs.begin(job, tokenizer(kind), (END,))


def updates(tokens: Sequence[int], cuts: Sequence[int], finish: Finish, logprobs: bool) -> list[SeqUpdate]:
    borders = [0, *sorted({cut for cut in cuts if 0 < cut < len(tokens)}), len(tokens)]
    return [
        SeqUpdate(
            0,
            tuple(tokens[start:stop]),
            tuple(entry(position, tokens[position]) for position in range(start, stop)) if logprobs else (),
            finish if stop == len(tokens) else None,
        )
        for start, stop in pairwise(borders)
    ]


def streamed(outputs: PromptOutputs, sent: Sequence[SeqUpdate], reads: Sequence[bool]) -> CompletionOutput:
    """Return the sum of the deltas of an output that is read after some of its updates."""
    (completion,) = outputs.completions
    deltas: list[Delta] = []
    for update, read in zip(sent, reads, strict=True):
        ended = outputs.take(0, update) or update.finish is not None
        if ended or read:
            deltas.append(completion.delta(last=ended))
            so_far = completion.output(ended=ended)
            assert so_far.text == "".join(delta.text for delta in deltas)
            assert so_far.token_ids == tuple(token for delta in deltas for token in delta.token_ids)
            assert (so_far.finish_reason is None) == (not ended)
        if ended:
            break
    assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    logprobs = [delta.logprobs for delta in deltas]
    return CompletionOutput(
        index=0,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=deltas[-1].finish_reason,
        cumulative_logprob=None,
        logprobs=None if None in logprobs else tuple(each for some in logprobs for each in some or ()),
        stop_reason=deltas[-1].stop_reason,
    )


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(steady, max_examples=150)
def test_deltas_add_up_to_the_whole_output(kind: str, data: st.DataObject) -> None:
    tokens = data.draw(hard_tokens(kind))
    prompt = data.draw(st.sampled_from([[3], [*tokens[:3]], tokenizer(kind).encode("the 日")]))
    params = data.draw(parameters(tokenizer(kind).decode(tokens, skip_special_tokens=False)))
    stop_ids = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (END,))}
    ends = [at for at, token in enumerate(tokens) if token in stop_ids]
    tokens = tokens[: ends[0] + 1] if ends else tokens
    finish = Finish.STOP if ends else data.draw(st.sampled_from([Finish.LENGTH, Finish.ABORT]))

    whole = begin(kind, params, prompt)
    (at_once,) = updates(tokens, [], finish, params.logprobs is not None)
    whole.take(0, at_once)
    (expected,) = whole.output().outputs

    cuts = data.draw(st.lists(st.integers(1, len(tokens)), max_size=len(tokens)))
    sent = updates(tokens, cuts, finish, params.logprobs is not None)
    reads = data.draw(st.lists(st.booleans(), min_size=len(sent), max_size=len(sent)))
    outputs = begin(kind, params, prompt)
    found = streamed(outputs, sent, reads)
    assert found == CompletionOutput(
        index=0,
        text=expected.text,
        token_ids=expected.token_ids,
        finish_reason=expected.finish_reason,
        cumulative_logprob=None,
        logprobs=expected.logprobs,
        stop_reason=expected.stop_reason,
    )
    (afterwards,) = outputs.output().outputs
    assert afterwards == expected
    for stop in params.stop or ():
        if params.include_stop_str_in_output or expected.stop_reason is None:
            continue
        if params.min_tokens == 0:
            assert stop not in expected.text


def test_text_that_may_begin_a_stop_text_is_held_back() -> None:
    params = SamplingParams(stop="wolf hides", max_tokens=100)
    found = tokenizer("bundled")
    outputs = begin("bundled", params, found.encode("Once"))
    (completion,) = outputs.completions
    for token in found.encode(" a wolf", add_special_tokens=False):
        assert not outputs.take(0, SeqUpdate(0, (token,)))
    assert completion.delta(last=False).text == " a "
    for token in found.encode(" hid", add_special_tokens=False):
        outputs.take(0, SeqUpdate(0, (token,)))
    assert completion.output(ended=False).text == " a "
    outputs.take(0, SeqUpdate(0, (), finish=Finish.ABORT))
    assert completion.delta(last=True).text == "wolf hid"
