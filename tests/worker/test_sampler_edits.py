"""Masks, allowed and forbidden tokens, biases and penalties, compared with plain arithmetic in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.comm.local import LocalComm
from shoal.parallel.mesh import Axis
from shoal.worker.logit_edits import Bias, Edits, Masks, Pairs, Penalties, apply_edits
from shoal.worker.sampler import VocabShare, sample
from support.fakes import steady
from worker.shares import CUTS, Float64, check_distribution, draw, even, keys_of, rows_of

NEVER = float("-inf")


@dataclass
class RequestedEdits:
    """The edits that one request asks for."""

    mask: set[int] | None = None
    allowed: list[int] | None = None
    forbidden: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


def plain(logits: Tensor, requested: RequestedEdits) -> Float64:
    """Return the edited logits of one row, computed token by token as the parameters are documented."""
    found: Float64 = logits.double().numpy().copy()
    for token in range(len(found)):
        forbidden = requested.mask is not None and token not in requested.mask
        forbidden |= requested.allowed is not None and token not in requested.allowed
        if forbidden or token in requested.forbidden:
            found[token] = NEVER
        found[token] += requested.bias.get(token, 0.0)
        if token in requested.prompt or token in requested.output:
            found[token] *= 1 / requested.repetition if found[token] > 0 else requested.repetition
        found[token] -= requested.frequency * requested.output.count(token)
        found[token] -= requested.presence * (token in requested.output)
    return found


def pairs_of(each: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    rows = [row for row, ids in enumerate(each) for _ in ids]
    return torch.tensor(rows, dtype=torch.int64), torch.tensor([i for ids in each for i in ids], dtype=torch.int64)


def bits_of(allowed: set[int], words: int) -> list[int]:
    values = [sum(1 << i for i in range(32) if 32 * word + i in allowed) for word in range(words)]
    return [value - (1 << 32) if value >= 1 << 31 else value for value in values]


def edits_of(requested: Sequence[RequestedEdits], words: int) -> Edits:
    masked = [row for row, one in enumerate(requested) if one.mask is not None]
    bits = [bits_of(requested[row].mask or set(), words) for row in masked]
    seen = [sorted({*one.prompt, *one.output}) for one in requested]
    counts = [one.output.count(i) for one, ids in zip(requested, seen, strict=True) for i in ids]
    listed = [row for row, one in enumerate(requested) if one.allowed is not None]
    listed_bits = [bits_of(set(requested[row].allowed or ()), words) for row in listed]
    biases = [value for one in requested for value in one.bias.values()]
    return Edits(
        masks=Masks(torch.tensor(masked), torch.tensor(bits, dtype=torch.int32).view(-1, words)) if masked else None,
        allowed=Masks(torch.tensor(listed), torch.tensor(listed_bits, dtype=torch.int32).view(-1, words))
        if listed
        else None,
        forbidden=Pairs(*pairs_of([one.forbidden for one in requested])),
        bias=Bias(*pairs_of([list(one.bias) for one in requested]), torch.tensor(biases, dtype=torch.float32)),
        penalties=Penalties(
            *pairs_of(seen),
            torch.tensor(counts, dtype=torch.int32),
            *(torch.tensor([getattr(w, name) for w in requested]) for name in ("presence", "frequency", "repetition")),
        ),
    )


def some_logits(rows: int, vocabulary: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def edited(logits: Tensor, edits: Edits, sizes: Sequence[int]) -> Tensor:
    parts = [part.clone() for part in logits.split(list(sizes), 1)]
    for rank, part in enumerate(parts):
        apply_edits(part, sum(sizes[:rank]), edits)
    return torch.cat(parts, 1)


REQUESTED = [
    RequestedEdits(),
    RequestedEdits(mask={0, 3, 7, 10}),
    RequestedEdits(allowed=[2, 9, 2000]),
    RequestedEdits(forbidden=[0, 1, 2, 5000]),
    RequestedEdits(bias={4: 3.5, 10: -100.0, 77: 1.0}),
    RequestedEdits(prompt=[1, 2, 2], output=[2, 3, 3, 3], presence=0.5, frequency=0.25, repetition=1.3),
    RequestedEdits(prompt=[0, 8], output=[10], presence=-1.0, frequency=-0.5, repetition=0.7),
    RequestedEdits({1, 2, 3, 4}, [2, 3, 4, 5], [3], {2: 1.0, 5: 50.0}, [2], [4, 4], 1.0, 1.0, 2.0),
]


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_logits_are_edited_as_documented(sizes: Sequence[int], words: int) -> None:
    """The tolerance allows for a few float32 operations on numbers up to 110. Forbidden tokens must match exactly."""
    logits = some_logits(len(REQUESTED), 11)
    found = edited(logits, edits_of(REQUESTED, words), sizes)
    for row, requested in enumerate(REQUESTED):
        expected = torch.from_numpy(plain(logits[row], requested))
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-6, atol=1e-5)
        assert torch.equal(found[row] == NEVER, expected == NEVER)


def test_logits_without_edits_are_unchanged() -> None:
    logits = some_logits(8, 100)
    found = edited(logits, edits_of(REQUESTED, 4), (60, 40))
    assert torch.equal(found[0], logits[0])
    assert torch.equal(found[1][[0, 3, 7, 10]], logits[1][[0, 3, 7, 10]])
    assert torch.equal(found[5][4:], logits[5][4:])


def test_a_bias_given_twice_counts_twice() -> None:
    logits = torch.zeros(1, 4)
    twice = Bias(torch.tensor([0, 0]), torch.tensor([2, 2]), torch.tensor([1.0, 0.5]))
    assert edited(logits, Edits(bias=twice), (4,)).tolist() == [[0, 0, 1.5, 0]]


@pytest.mark.parametrize("words", [0, 1, 2, 4])
@pytest.mark.parametrize("sizes", [(130,), (33, 97), (64, 0, 66), (1, 31, 98)], ids=str)
def test_masks_are_applied_at_every_alignment(sizes: Sequence[int], words: int) -> None:
    """Masks have full, empty and mixed words, and tokens beyond the last word."""
    allowed = {*range(32, 64), *range(100, 128, 3), 3, 129}
    logits = some_logits(3, 130)
    masks = Masks(torch.tensor([2, 0]), torch.tensor([bits_of(allowed, words), bits_of({5}, words)]).int())
    found = edited(logits, Edits(masks=masks), sizes)
    kept = torch.tensor([i in allowed and i < 32 * words for i in range(130)])
    assert torch.equal(found[2], logits[2].masked_fill(~kept, NEVER))
    assert torch.equal(found[1], logits[1])
    assert (found[0] > NEVER).nonzero().flatten().tolist() == [5] * (words > 0)


def distribution(
    logits: Tensor, requested: RequestedEdits, temperature: float, top_k: int, top_p: float, min_p: float
) -> Float64:
    scaled = plain(logits, requested) / temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled - scaled.max())[order]
    weights[weights < min_p] = 0
    weights[top_k or len(weights) :] = 0
    weights /= weights.sum()
    weights[np.cumsum(weights) - weights >= top_p] = 0
    found: Float64 = np.zeros(len(weights))
    found[order] = weights / weights.sum()
    return found


@pytest.mark.parametrize("row", range(len(REQUESTED)))
def test_draws_follow_the_edited_distribution(row: int) -> None:
    logits = some_logits(1, 11, seed=row)[0]
    count = 6000
    rows = rows_of(1.5, 5, 0.95, 0.02, count=count, edits=edits_of([REQUESTED[row]] * count, 1))
    tokens = draw(logits.expand(count, -1), rows, (11,))
    check_distribution(tokens, distribution(logits, REQUESTED[row], 1.5, 5, 0.95, 0.02))


TOKENS = st.lists(st.integers(0, 69), max_size=6)
ONE_REQUESTED = st.builds(
    RequestedEdits,
    mask=st.none() | st.sets(st.integers(0, 69), min_size=1),
    allowed=st.none() | st.lists(st.integers(0, 80), min_size=1, max_size=5),
    forbidden=TOKENS,
    bias=st.dictionaries(st.integers(0, 69), st.floats(-100, 100, width=32), max_size=4),
    prompt=TOKENS,
    output=TOKENS,
    presence=st.floats(-2, 2, width=32),
    frequency=st.floats(-2, 2, width=32),
    repetition=st.floats(0.5, 2, width=32),
)
TRUNCATION = st.tuples(
    st.sampled_from([0.0, 0.7, 1.0, 4.0]), st.integers(0, 90), st.floats(0.05, 1), st.sampled_from([0.0, 0.1, 1.0])
)


@settings(steady, max_examples=60)
@given(
    requested=st.lists(st.tuples(ONE_REQUESTED, TRUNCATION), min_size=1, max_size=5),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_any_combination_draws_an_allowed_token(
    requested: list[tuple[RequestedEdits, tuple[float, int, float, float]]], ranks: int, seed: int
) -> None:
    """By plain arithmetic, drawn tokens are possible and greedy tokens the likeliest, in every cut of the vocabulary.

    A token within 1e-4 of a limit of top_p or min_p may be on either side of it, because float32 rounds.
    """
    logits = some_logits(len(requested), 70, seed)
    asked = [one for one, _ in requested]
    temperature, top_k, top_p, min_p = (
        list(column) for column in zip(*(limits for _, limits in requested), strict=True)
    )
    rows = rows_of(
        temperature,
        top_k,
        top_p,
        min_p,
        count=len(requested),
        keys=keys_of(len(requested), seed),
        edits=edits_of(asked, 3),
    )
    tokens = draw(logits, rows, (70,))
    assert torch.equal(draw(logits, rows, even(70, ranks)), tokens)
    for row, token in enumerate(tokens.tolist()):
        scores = plain(logits[row], asked[row])
        if np.isneginf(scores).all():
            assert token == logits[row].argmax()
        elif temperature[row] == 0:
            assert scores[token] > scores.max() - 1e-4
        else:
            limits = temperature[row], top_k[row], min(1.0, top_p[row] + 1e-4), min_p[row] * 0.9999
            assert distribution(logits[row], asked[row], *limits)[token] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("top_k", "min_p"), [(0, 0.0), (3, 0.0), (0, 0.5)])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_a_row_without_possible_tokens_still_gets_a_token(
    sizes: Sequence[int], temperature: float, top_k: int, min_p: float
) -> None:
    """The row gets the lowest id that is not forbidden. If all are forbidden, it gets the token with the largest logit
    before the edits."""
    logits = some_logits(7, 11)
    logits[3:6, [4, 6]] = NEVER
    logits[6] = NEVER
    requested = [
        RequestedEdits(mask=set()),
        RequestedEdits(mask={3}, forbidden=[3]),
        RequestedEdits(forbidden=list(range(11))),
        RequestedEdits(mask={6, 4}),
        RequestedEdits(allowed=[6, 4]),
        RequestedEdits(allowed=[500]),
        RequestedEdits(forbidden=[0, 2], prompt=[1], repetition=2.0),
    ]
    rows = rows_of(temperature, top_k, 1.0, min_p, count=7, edits=edits_of(requested, 1))
    expected = logits.argmax(1)
    expected[[3, 4, 6]] = torch.tensor([4, 4, 1])
    assert torch.equal(draw(logits, rows, sizes), expected)


def test_rows_of_minus_infinity_get_an_id() -> None:
    logits = torch.full((4, 11), NEVER)
    for rows in (rows_of(0.0, count=4), rows_of(1.0, count=4), rows_of(1.0, 3, 0.5, 0.1, count=4)):
        for sizes in CUTS:
            assert draw(logits, rows, sizes).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("logprobs", [-1, 0, 3])
def test_logits_are_copied_before_edits_only_if_logprobs_need_them(logprobs: int) -> None:
    logits = some_logits(1, 11)
    before = logits.clone()
    rows = rows_of(1.0, count=1, edits=edits_of([RequestedEdits(forbidden=[3])], 1), logprobs=logprobs)
    sample(logits, VocabShare(0, (11,)), Axis("tp", 0, 1, LocalComm()), rows)
    assert torch.equal(logits, before) == (logprobs >= 0)
