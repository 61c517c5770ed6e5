"""Helpers for tests of the sampler: ranks with shares of the vocabulary, and rows of parameters."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.comm.local import LocalComm
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.parallel.mesh import Axis
from shoal.parallel.partition import split
from shoal.worker.logit_edits import Edits
from shoal.worker.random import row_keys, split_keys
from shoal.worker.sampler import SamplingRows, VocabShare, sample
from support.fakes import on_threads

T = TypeVar("T")
Float64 = npt.NDArray[np.float64]

CUTS = [(11,), (6, 5), (4, 4, 3), (3, 2, 2, 2, 2), (7, 0, 4), (0, 11), (1, 0, 0, 9, 1)]


def even(vocabulary: int, ranks: int) -> tuple[int, ...]:
    return tuple(len(share) for share in split(vocabulary, ranks))


def over_ranks(sizes: Sequence[int], work: Callable[[VocabShare, Axis, slice], T]) -> list[T]:
    """Run `work(share, axis, columns)` in one thread for each rank, and return the results by rank."""
    group = ThreadGroup(len(sizes), 20)

    def run(rank: int) -> T:
        comm = ThreadComm(group, rank) if len(sizes) > 1 else LocalComm()
        start = sum(sizes[:rank])
        share = VocabShare(start, tuple(sizes))
        return work(share, Axis("tp", rank, len(sizes), comm), slice(start, start + sizes[rank]))

    return on_threads(len(sizes), run)


def draw(logits: Tensor, rows: SamplingRows, sizes: Sequence[int]) -> Tensor:
    """Return the drawn tokens, and check that they are the same on every rank."""
    results = over_ranks(sizes, lambda share, tp, columns: sample(logits[:, columns].clone(), share, tp, rows))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    return results[0]


def keys_of(count: int, seed: int = 5) -> Tensor:
    zeros = np.zeros(count, np.uint64)
    return split_keys(row_keys(zeros + np.uint64(seed), zeros, np.arange(count, dtype=np.uint64)))


def rows_of(
    temperature: Sequence[float] | float,
    top_k: Sequence[int] | int = 0,
    top_p: Sequence[float] | float = 1.0,
    min_p: Sequence[float] | float = 0.0,
    *,
    count: int,
    keys: Tensor | None = None,
    edits: Edits | None = None,
    logprobs: int = -1,
) -> SamplingRows:
    temperatures = torch.tensor(temperature).expand(count).contiguous()
    top_ks = torch.tensor(top_k).expand(count).contiguous()
    top_ps = torch.tensor(top_p).expand(count).contiguous()
    min_ps = torch.tensor(min_p).expand(count).contiguous()
    truncated = (temperatures > 0) & ((top_ks > 0) | (top_ps < 1) | (min_ps > 0))
    return SamplingRows(
        temperatures,
        top_ks,
        top_ps,
        min_ps,
        keys_of(count) if keys is None else keys,
        not bool(temperatures.any()),
        truncated.nonzero().flatten().tolist(),
        logprobs,
        edits,
    )


def check_distribution(tokens: Tensor, expected: Float64, cells: int = 0) -> None:
    """Check by a chi-square test that tokens were drawn from this distribution.

    With d degrees of freedom, chi-square has the mean d and the deviation sqrt(2 d); six deviations are allowed. As
    seeds are fixed, the result is always the same. If a probability of 0.1 changed by a twentieth, 20,000 draws would
    show about so much.
    """
    counts = np.bincount(tokens.numpy(), minlength=len(expected)).astype(float)
    assert not counts[expected == 0].any(), "a token with probability 0 was drawn"
    if cells:
        counts, expected = (a.reshape(cells, -1).sum(1) for a in (counts, expected))
    expected = expected * len(tokens)
    rare = expected < 10  # counted together, because chi-square needs some draws in every cell
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    freedom = len(expected) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 6 * (2 * freedom) ** 0.5
