"""Masks, allowed and forbidden tokens, biases and penalties over any cut of the vocabulary, against plain float64."""

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
from shoal.worker.edits import Bias, Edits, Masks, Pairs, Penalties, edit
from shoal.worker.sampler import VocabShare, sample
from support.fakes import steady
from worker.shares import CUTS, Float64, check_distribution, draw, even, keys_of, rows_of

NEVER = float("-inf")


@dataclass
class Wishes:
    """What one request asks for."""

    mask: set[int] | None = None
    allowed: list[int] | None = None
    never: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0


def plain(logits: Tensor, wishes: Wishes) -> Float64:
    """One row, token by token, as the parameters are documented."""
    found: Float64 = logits.double().numpy().copy()
    for token in range(len(found)):
        forbidden = wishes.mask is not None and token not in wishes.mask
        forbidden |= wishes.allowed is not None and token not in wishes.allowed
        if forbidden or token in wishes.never:
            found[token] = NEVER
        found[token] += wishes.bias.get(token, 0.0)
        if token in wishes.prompt or token in wishes.output:
            found[token] *= 1 / wishes.repetition if found[token] > 0 else wishes.repetition
        found[token] -= wishes.frequency * wishes.output.count(token)
        found[token] -= wishes.presence * (token in wishes.output)
    return found


def pairs_of(each: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    rows = [row for row, ids in enumerate(each) for _ in ids]
    return torch.tensor(rows, dtype=torch.int64), torch.tensor([i for ids in each for i in ids], dtype=torch.int64)


def bits_of(allowed: set[int], words: int) -> list[int]:
    values = [sum(1 << i for i in range(32) if 32 * word + i in allowed) for word in range(words)]
    return [value - (1 << 32) if value >= 1 << 31 else value for value in values]


def edits_of(wishes: Sequence[Wishes], words: int) -> Edits:
    masked = [row for row, wish in enumerate(wishes) if wish.mask is not None]
    bits = [bits_of(wishes[row].mask or set(), words) for row in masked]
    seen = [sorted({*wish.prompt, *wish.output}) for wish in wishes]
    counts = [wish.output.count(i) for wish, ids in zip(wishes, seen, strict=True) for i in ids]
    listed = [row for row, wish in enumerate(wishes) if wish.allowed is not None]
    listed_bits = [bits_of(set(wishes[row].allowed or ()), words) for row in listed]
    biases = [value for wish in wishes for value in wish.bias.values()]
    return Edits(
        masks=Masks(torch.tensor(masked), torch.tensor(bits, dtype=torch.int32).view(-1, words)) if masked else None,
        allowed=Masks(torch.tensor(listed), torch.tensor(listed_bits, dtype=torch.int32).view(-1, words))
        if listed
        else None,
        never=Pairs(*pairs_of([wish.never for wish in wishes])),
        bias=Bias(*pairs_of([list(wish.bias) for wish in wishes]), torch.tensor(biases, dtype=torch.float32)),
        penalties=Penalties(
            *pairs_of(seen),
            torch.tensor(counts, dtype=torch.int32),
            *(torch.tensor([getattr(w, name) for w in wishes]) for name in ("presence", "frequency", "repetition")),
        ),
    )


def some_logits(rows: int, vocabulary: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def edited(logits: Tensor, edits: Edits, sizes: Sequence[int]) -> Tensor:
    parts = [part.clone() for part in logits.split(list(sizes), 1)]
    for rank, part in enumerate(parts):
        edit(part, sum(sizes[:rank]), edits)
    return torch.cat(parts, 1)


WISHES = [
    Wishes(),
    Wishes(mask={0, 3, 7, 10}),
    Wishes(allowed=[2, 9, 2000]),
    Wishes(never=[0, 1, 2, 5000]),
    Wishes(bias={4: 3.5, 10: -100.0, 77: 1.0}),
    Wishes(prompt=[1, 2, 2], output=[2, 3, 3, 3], presence=0.5, frequency=0.25, repetition=1.3),
    Wishes(prompt=[0, 8], output=[10], presence=-1.0, frequency=-0.5, repetition=0.7),
    Wishes({1, 2, 3, 4}, [2, 3, 4, 5], [3], {2: 1.0, 5: 50.0}, [2], [4, 4], 1.0, 1.0, 2.0),
]


@pytest.mark.parametrize("words", [1, 2])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_logits_are_edited_as_documented(sizes: Sequence[int], words: int) -> None:
    """A few float32 operations on numbers up to 110: 1e-5. What is forbidden is so exactly."""
    logits = some_logits(len(WISHES), 11)
    found = edited(logits, edits_of(WISHES, words), sizes)
    for row, wishes in enumerate(WISHES):
        expected = torch.from_numpy(plain(logits[row], wishes))
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-6, atol=1e-5)
        assert torch.equal(found[row] == NEVER, expected == NEVER)


def test_what_is_not_edited_keeps_its_bits() -> None:
    logits = some_logits(8, 100)
    found = edited(logits, edits_of(WISHES, 4), (60, 40))
    assert torch.equal(found[0], logits[0])
    assert torch.equal(found[1][[0, 3, 7, 10]], logits[1][[0, 3, 7, 10]])
    assert torch.equal(found[5][4:], logits[5][4:])


def test_a_bias_that_is_given_twice_counts_twice() -> None:
    logits = torch.zeros(1, 4)
    twice = Bias(torch.tensor([0, 0]), torch.tensor([2, 2]), torch.tensor([1.0, 0.5]))
    assert edited(logits, Edits(bias=twice), (4,)).tolist() == [[0, 0, 1.5, 0]]


@pytest.mark.parametrize("words", [0, 1, 2, 4])
@pytest.mark.parametrize("sizes", [(130,), (33, 97), (64, 0, 66), (1, 31, 98)], ids=str)
def test_masks_at_every_alignment(sizes: Sequence[int], words: int) -> None:
    """Full words, empty ones, mixed ones, and what lies beyond the last one."""
    allowed = {*range(32, 64), *range(100, 128, 3), 3, 129}
    logits = some_logits(3, 130)
    masks = Masks(torch.tensor([2, 0]), torch.tensor([bits_of(allowed, words), bits_of({5}, words)]).int())
    found = edited(logits, Edits(masks=masks), sizes)
    kept = torch.tensor([i in allowed and i < 32 * words for i in range(130)])
    assert torch.equal(found[2], logits[2].masked_fill(~kept, NEVER))
    assert torch.equal(found[1], logits[1])
    assert (found[0] > NEVER).nonzero().flatten().tolist() == [5] * (words > 0)


def distribution(logits: Tensor, wishes: Wishes, temperature: float, top_k: int, top_p: float, min_p: float) -> Float64:
    scaled = plain(logits, wishes) / temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled - scaled.max())[order]
    weights[weights < min_p] = 0
    weights[top_k or len(weights) :] = 0
    weights /= weights.sum()
    weights[np.cumsum(weights) - weights >= top_p] = 0
    found: Float64 = np.zeros(len(weights))
    found[order] = weights / weights.sum()
    return found


@pytest.mark.parametrize("row", range(len(WISHES)))
def test_draws_follow_the_edited_distribution(row: int) -> None:
    logits = some_logits(1, 11, seed=row)[0]
    count = 6000
    rows = rows_of(1.5, 5, 0.95, 0.02, count=count, edits=edits_of([WISHES[row]] * count, 1))
    tokens = draw(logits.expand(count, -1), rows, (11,))
    check_distribution(tokens, distribution(logits, WISHES[row], 1.5, 5, 0.95, 0.02))


TOKENS = st.lists(st.integers(0, 69), max_size=6)
A_WISH = st.builds(
    Wishes,
    mask=st.none() | st.sets(st.integers(0, 69), min_size=1),
    allowed=st.none() | st.lists(st.integers(0, 80), min_size=1, max_size=5),
    never=TOKENS,
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
    wishes=st.lists(st.tuples(A_WISH, TRUNCATION), min_size=1, max_size=5),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_any_combination_draws_what_it_may(
    wishes: list[tuple[Wishes, tuple[float, int, float, float]]], ranks: int, seed: int
) -> None:
    """Every token drawn is one that plain arithmetic leaves; the greedy one is its largest; cuts change nothing.

    A token within 1e-4 of a border of top_p or min_p may fall on either side, as float32 rounds.
    """
    logits = some_logits(len(wishes), 70, seed)
    asked = [wish for wish, _ in wishes]
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*(limits for _, limits in wishes), strict=True))
    rows = rows_of(
        temperature, top_k, top_p, min_p, count=len(wishes), keys=keys_of(len(wishes), seed), edits=edits_of(asked, 3)
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
def test_rows_without_a_token(sizes: Sequence[int], temperature: float, top_k: int, min_p: float) -> None:
    """The lowest permitted id where the model gives none of them a chance, else the likeliest before the edits."""
    logits = some_logits(7, 11)
    logits[3:6, [4, 6]] = NEVER
    logits[6] = NEVER
    wishes = [
        Wishes(mask=set()),
        Wishes(mask={3}, never=[3]),
        Wishes(never=list(range(11))),
        Wishes(mask={6, 4}),
        Wishes(allowed=[6, 4]),
        Wishes(allowed=[500]),
        Wishes(never=[0, 2], prompt=[1], repetition=2.0),
    ]
    rows = rows_of(temperature, top_k, 1.0, min_p, count=7, edits=edits_of(wishes, 1))
    expected = logits.argmax(1)
    expected[[3, 4, 6]] = torch.tensor([4, 4, 1])
    assert torch.equal(draw(logits, rows, sizes), expected)


def test_rows_without_a_chance_and_without_edits_give_an_id() -> None:
    logits = torch.full((4, 11), NEVER)
    for rows in (rows_of(0.0, count=4), rows_of(1.0, count=4), rows_of(1.0, 3, 0.5, 0.1, count=4)):
        for sizes in CUTS:
            assert draw(logits, rows, sizes).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("logprobs", [-1, 0, 3])
def test_logits_are_kept_only_for_who_asks(logprobs: int) -> None:
    logits = some_logits(1, 11)
    before = logits.clone()
    rows = rows_of(1.0, count=1, edits=edits_of([Wishes(never=[3])], 1), logprobs=logprobs)
    sample(logits, VocabShare(0, (11,)), Axis("tp", 0, 1, LocalComm()), rows)
    assert torch.equal(logits, before) == (logprobs >= 0)
