"""The sampler with the vocabulary cut in different ways, compared with a plain reference in float64."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.gumbel_noise import gumbel
from shoal.kernels.sampling import TorchSampling
from shoal.parallel.mesh import Axis
from shoal.worker import sampler
from shoal.worker.sampler import Logprobs, VocabShare, logprobs
from support.fakes import steady
from worker.shares import CUTS, Float64, check_distribution, draw, even, keys_of, over_ranks, rows_of


def reference(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Float64:
    """Return the distribution from which tokens are drawn. Of tokens with equal logits, the lowest ids come first."""
    scaled: Float64 = logits.double().numpy() / temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled - scaled.max())[order]
    weights[weights < min_p] = 0  # the weight of the likeliest is 1
    if top_k:
        weights[top_k:] = 0
    weights /= weights.sum()
    weights[np.cumsum(weights) - weights >= top_p] = 0
    found: Float64 = np.zeros(len(weights))
    found[order] = weights / weights.sum()
    return found


LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.9, 0.0, 1.2, -0.4, 0.9, 2.2, -2.0, 0.5])


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (2.0, 0, 1.0, 0.0), (1.0, 4, 1.0, 0.0), (0.7, 0, 0.8, 0.0),
        (1.3, 6, 0.7, 0.0), (1.0, 99, 0.5, 0.0), (1.0, 0, 1.0, 0.25), (0.5, 0, 1.0, 0.25), (2.0, 0, 0.7, 0.4),
        (1.5, 6, 0.8, 0.3), (1.0, 3, 1.0, 0.01),
    ],
)  # fmt: skip
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    count = 20_000
    rows = rows_of(temperature, top_k, top_p, min_p, count=count)
    tokens = draw(LOGITS.expand(count, -1).contiguous(), rows, (11,))
    check_distribution(tokens, reference(LOGITS, temperature, top_k, top_p, min_p))


def test_top_p_counts_only_the_tokens_that_min_p_keeps() -> None:
    """Of the weights 1, 0.6, 0.3 and 0.1, min-p keeps three. The first is 53 % of their sum, so it alone reaches a
    top-p of 0.52. It is only 50 % of all four, so it would not reach 0.52 if all of them counted."""
    logits = torch.tensor([[1.0, 0.6, 0.3, 0.1]]).log().expand(300, -1)
    assert set(draw(logits, rows_of(1.0, 0, 0.52, 0.2, count=300), (2, 2)).tolist()) == {0}
    assert set(draw(logits, rows_of(1.0, 0, 0.52, count=300), (2, 2)).tolist()) == {0, 1}


@pytest.mark.parametrize("sizes", CUTS[1:], ids=str)
def test_every_cut_of_the_vocabulary_draws_the_same_tokens(sizes: Sequence[int]) -> None:
    """The batch has greedy rows, rows that draw from all tokens, and truncated rows."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(600, 11, generator=generator) * 2
    rows = rows_of(
        [0.0, 1.0, 0.6, 1.0, 2.0, 1.0] * 100,
        [0, 0, 3, 0, 5, 1] * 100,
        [1.0, 1.0, 1.0, 0.73, 0.61, 1.0] * 100,
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.3, 0.3, 0.1, 0.1, 0.2, 0.01] * 50,
        count=600,
    )
    assert torch.equal(draw(logits, rows, sizes), draw(logits, rows, (11,)))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_cut_draws_the_same_tokens_from_equal_logits(ranks: int) -> None:
    """Logits in half precision are often equal. The tokens that top-k leaves out must not depend on the cut."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randint(
        0, 3, (200, 1501), generator=generator
    ).float()  # 500 tokens with each logit, more than the first candidates
    rows = rows_of(1.0, [1, 2, 40, 500] * 50, [1.0, 0.77, 0.9, 0.63] * 50, count=200)
    one = draw(logits, rows, (1501,))
    assert torch.equal(draw(logits, rows, even(1501, ranks)), one)
    for row in range(0, 200, 7):
        allowed = reference(logits[row], 1.0, int(rows.top_k[row]), 1.0)
        assert allowed[one[row]] > 0


@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_greedy_takes_the_first_of_the_largest_logits(sizes: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 4, (100, 11), generator=generator).float()
    tokens = draw(logits, rows_of(0.0, count=100), sizes)
    assert torch.equal(tokens, torch.from_numpy(logits.numpy().argmax(1)))
    mixed = rows_of([0.0, 1.0] * 50, count=100)
    assert torch.equal(draw(logits, mixed, sizes)[::2], tokens[::2]), "noise must not reach greedy rows"


@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_top_k_of_one_is_greedy(sizes: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(100, 11, generator=generator)
    assert torch.equal(draw(logits, rows_of(1.5, 1, count=100), sizes), logits.argmax(1))


def test_a_tiny_top_p_is_greedy() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(100, 11, generator=generator)
    assert torch.equal(draw(logits, rows_of(1.5, 0, 1e-6, count=100), (6, 5)), logits.argmax(1))


@pytest.mark.parametrize("sizes", [(2000,), (700, 0, 1300)], ids=str)
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 0.9, 0.0), (1900, 0.9, 0.0), (0, 0.95, 0.82), (0, 1.0, 0.84)]
)
def test_a_nucleus_larger_than_the_first_candidates_has_the_right_tokens(
    sizes: Sequence[int], top_k: int, top_p: float, min_p: float
) -> None:
    """The distribution is nearly flat over 2000 ids in random order, and keeps about 1700 of them."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.linspace(0, 0.2, 2000)[torch.randperm(2000, generator=generator)]
    expected = reference(logits, 1.0, top_k, top_p, min_p)
    assert 1600 < (expected > 0).sum() < 1950
    rows = rows_of(1.0, top_k, top_p, min_p, count=1500)
    tokens = draw(logits.expand(1500, -1).contiguous(), rows, sizes)
    check_distribution(tokens, expected, cells=40)
    inside = np.flatnonzero(expected)
    least = inside[expected[inside].argsort()[:400]]
    assert np.isin(tokens.numpy(), least).sum() > 200, "tokens at the end of the nucleus are drawn too rarely"


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("sizes", [(30_011,), (1, 20_000, 10_010)], ids=str)
def test_pytorch_and_native_kernels_draw_the_same_tokens(
    sizes: Sequence[int], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nucleus has a few tokens or thousands. Where no kernels are compiled, PyTorch is compared with itself."""
    logits = torch.randn(24, 30_011, generator=torch.Generator().manual_seed(3)) * scale
    rows = rows_of(
        [0.0, 1.0, 0.8, 1.3, 1.0, 1.0] * 4,
        [0, 0, 50, 0, 700, 0] * 4,
        [1.0, 1.0, 0.9, 0.9, 1.0, 1.0] * 4,
        [0.0, 0.0, 0.02, 0.0, 0.0, 0.3] * 4,
        count=24,
    )
    tokens = draw(logits, rows, sizes)
    monkeypatch.setattr(sampler, "sampling_kernels", lambda _: TorchSampling())
    assert torch.equal(draw(logits, rows, sizes), tokens)


def test_a_wide_nucleus_over_many_equal_logits_is_the_same_in_every_cut() -> None:
    """The border of the nucleus is inside a group of 500 equal logits, more than there are first candidates."""
    logits = torch.randint(0, 3, (100, 1501), generator=torch.Generator().manual_seed(2)).float()
    rows = rows_of(1.0, 0, [0.5, 0.7, 0.9, 0.95] * 25, [0.0, 0.3] * 50, count=100)
    one = draw(logits, rows, (1501,))
    for sizes in (even(1501, 2), even(1501, 3), (0, 1500, 1)):
        assert torch.equal(draw(logits, rows, sizes), one)
    for row in range(100):
        expected = reference(logits[row], 1.0, 0, float(rows.top_p[row]), float(rows.min_p[row]))
        assert expected[one[row]] > 0


def test_truncation_changes_no_draw_that_it_allows() -> None:
    """The noise is the same, so a row draws the same token with truncation, if the truncation keeps that token."""
    logits = LOGITS.expand(500, -1).contiguous()
    free = draw(logits, rows_of(1.0, count=500), (11,))
    kept = torch.from_numpy(reference(LOGITS, 1.0, 5) > 0)[free]
    limited = draw(logits, rows_of(1.0, 5, count=500), (11,))
    assert 100 < int(kept.sum()) < 500
    assert torch.equal(limited[kept], free[kept])


@settings(steady, max_examples=30)
@given(data=st.data(), ranks=st.sampled_from([1, 2, 3, 5]))
def test_a_draw_does_not_depend_on_other_rows(data: st.DataObject, ranks: int) -> None:
    """A row draws the same token alone and among others, in any order."""
    count = data.draw(st.integers(2, 8))
    seed = data.draw(st.integers(0, 1000))
    logits = torch.randn(count, 300, generator=torch.Generator().manual_seed(seed)) * 3
    options = st.sampled_from(
        [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 3, 1.0, 0.1), (1.2, 0, 0.9, 0.0), (3.0, 270, 0.95, 0.0),
         (9.0, 0, 0.97, 0.3), (9.0, 0, 1.0, 0.2)]
    )  # fmt: skip
    chosen = data.draw(st.lists(options, min_size=count, max_size=count))
    temperatures, top_ks, top_ps, min_ps = (list(column) for column in zip(*chosen, strict=True))
    keys = keys_of(count, seed)
    together = draw(logits, rows_of(temperatures, top_ks, top_ps, min_ps, count=count, keys=keys), even(300, ranks))
    order = data.draw(st.permutations(range(count)))
    some = order[: data.draw(st.integers(1, count))]
    apart = draw(
        logits[some],
        rows_of(
            [temperatures[i] for i in some],
            [top_ks[i] for i in some],
            [top_ps[i] for i in some],
            [min_ps[i] for i in some],
            count=len(some),
            keys=keys[some],
        ),
        even(300, ranks),
    )
    assert torch.equal(apart, together[some])


def test_an_untruncated_draw_is_the_argmax_of_logits_plus_noise() -> None:
    generator = torch.Generator().manual_seed(8)
    logits, keys = torch.randn(50, 11, generator=generator), keys_of(50)
    noise = gumbel(keys, torch.arange(11, dtype=torch.int32))
    tokens = draw(logits, rows_of(0.5, count=50, keys=keys), (4, 4, 3))
    assert torch.equal(tokens, (logits / 0.5 + noise).argmax(1))


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 11, 99])
def test_logprobs_are_those_of_the_whole_vocabulary(sizes: Sequence[int], count: int) -> None:
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(20, 11, generator=generator) * 4
    tokens = torch.randint(0, 11, (20,), generator=generator)

    def run(share: VocabShare, tp: Axis, columns: slice) -> Logprobs:
        return logprobs(logits[:, columns].contiguous(), share, tp, tokens, count)

    expected = logits.double().log_softmax(1)
    values, ids = expected.sort(dim=1, descending=True, stable=True)
    for found in over_ranks(sizes, run):
        torch.testing.assert_close(
            found.chosen.double(), expected.gather(1, tokens[:, None])[:, 0], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(found.values.double(), values[:, :count], rtol=1e-5, atol=1e-5)
        assert torch.equal(found.ids, ids[:, :count])
        assert torch.equal(found.ranks, (logits > logits.gather(1, tokens[:, None])).sum(1) + 1)


@pytest.mark.parametrize("sizes", [(701,), (300, 1, 400)], ids=str)
def test_logprobs_list_the_lowest_ids_of_equally_likely_tokens(sizes: Sequence[int]) -> None:
    logits = torch.zeros(2, 701)
    logits[1, 650:] = 1.0

    def run(share: VocabShare, tp: Axis, columns: slice) -> Logprobs:
        return logprobs(logits[:, columns].contiguous(), share, tp, torch.tensor([3, 3]), 60)

    for found in over_ranks(sizes, run):
        assert sorted(found.ids[1, :51].tolist()) == list(range(650, 701))
        assert found.ids[1, :51].tolist() == sorted(found.ids[1, :51].tolist())
