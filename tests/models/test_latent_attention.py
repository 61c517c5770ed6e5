"""Latent attention in its absorbed form gives the results of attention over expanded keys and values."""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.common import BOTH, NATIVE, needs_native
from kernels.paged import make_batch
from shoal.comm.local import LocalComm
from shoal.kernels.base import AttentionParams, HeadLayout, Kernels, KVCache, Norm, PagedBatch
from shoal.kernels.linear import Linear, make_head_linear, make_linear
from shoal.models.layers.latent_attention import LatentAttention, LowRankLinear
from shoal.models.layers.rope import rope_tables
from shoal.models.spec import LatentSpec, NormSpec, RopeSpec
from shoal.parallel.linear import RowParallelLinear
from shoal.parallel.mesh import Axis

HIDDEN, HEADS = 48, 5
LATENT = LatentSpec(
    q_rank=20,
    kv_rank=24,
    nope_dim=10,
    rope_dim=8,
    value_dim=14,
    rope=RopeSpec(10000.0, rotary_dim=8),
    norm=NormSpec("rms", 1e-6),
    interleaved=True,
)
LENS = [(1, 1), (1, 2), (1, 300), (2, 2), (4, 70), (11, 40), (30, 30)]  # (queries, context) of each sequence
SCALE = 0.3


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of latent attention, in float64. `q_down` and `q_norm` are used only if the spec has a `q_rank`."""

    q_down: Tensor
    q_norm: Tensor
    q_up: Tensor
    kv_down: Tensor
    kv_norm: Tensor
    k_up: Tensor  # [heads, nope_dim, kv_rank]
    v_up: Tensor  # [heads, value_dim, kv_rank]


def make_weights(latent: LatentSpec, dtype: torch.dtype) -> Weights:
    def matrix(*shape: int) -> Tensor:
        return (torch.randn(shape) / math.sqrt(shape[-1])).to(dtype).double()

    q_rank = latent.q_rank or 1
    return Weights(
        matrix(q_rank, HIDDEN),
        (torch.rand(q_rank) + 0.5).to(dtype).double(),
        matrix(HEADS * latent.query_dim, HIDDEN if latent.q_rank is None else q_rank),
        matrix(latent.cached_dim, HIDDEN),
        (torch.rand(latent.kv_rank) + 0.5).to(dtype).double(),
        matrix(HEADS, latent.nope_dim, latent.kv_rank),
        matrix(HEADS, latent.value_dim, latent.kv_rank),
    )


def make_attention(latent: LatentSpec, weights: Weights, kernels: Kernels, dtype: torch.dtype) -> LatentAttention:
    def norm(weight: Tensor) -> Norm:
        return Norm("rms", weight.to(dtype), None, latent.norm.eps)

    queries: Linear = make_linear(weights.q_up.to(dtype), None)
    if latent.q_rank is not None:
        down = make_linear(weights.q_down.to(dtype), None)
        queries = LowRankLinear(down, norm(weights.q_norm), queries, kernels)
    return LatentAttention(
        latent,
        queries,
        make_linear(weights.kv_down.to(dtype), None),
        norm(weights.kv_norm),
        make_head_linear(weights.k_up.transpose(1, 2).to(dtype)),
        make_head_linear(weights.v_up.to(dtype)),
        RowParallelLinear(make_linear(torch.eye(HEADS * latent.value_dim, dtype=dtype), None), None, ALONE, kernels),
        rope_tables(latent.rope, latent.cached_dim, 400, torch.device("cpu")),
        HeadLayout(HEADS, 1, latent.cached_dim, (0,) * HEADS),
        AttentionParams(SCALE),
        kernels,
    )


ALONE = Axis("tp", 0, 1, LocalComm())


def expanded(latent: LatentSpec, weights: Weights, x: Tensor) -> Tensor:
    """Compute the attention of one sequence by its formula, in float64: [n, HEADS * value_dim]."""
    x, n = x.double(), len(x)

    def norm(rows: Tensor, weight: Tensor) -> Tensor:
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + latent.norm.eps) * weight

    def rotated(rows: Tensor) -> Tensor:
        """Rotate rows: [n, heads, rope_dim], with each pair as a complex number."""
        half = latent.rope_dim // 2
        angles = torch.outer(torch.arange(n).double(), 10000.0 ** (-torch.arange(half).double() / half)).unsqueeze(1)
        pairs = rows.unflatten(-1, (half, 2)) if latent.interleaved else rows.unflatten(-1, (2, half)).transpose(-1, -2)
        product = torch.view_as_complex(pairs.clone(memory_format=torch.contiguous_format)) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(product).flatten(-2)

    q = x if latent.q_rank is None else norm(x @ weights.q_down.T, weights.q_norm)
    q = (q @ weights.q_up.T).view(n, HEADS, latent.query_dim)
    q = torch.cat((q[..., : latent.nope_dim], rotated(q[..., latent.nope_dim :])), dim=-1)
    latents, shared = (x @ weights.kv_down.T).split([latent.kv_rank, latent.rope_dim], dim=1)
    latents = norm(latents, weights.kv_norm)
    keys = torch.einsum("nk,hdk->nhd", latents, weights.k_up)
    keys = torch.cat((keys, rotated(shared.unsqueeze(1)).expand(-1, HEADS, -1)), dim=-1)
    values = torch.einsum("nk,hdk->nhd", latents, weights.v_up)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * SCALE
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)


def prefix_batch(batch: PagedBatch) -> PagedBatch:
    """Return a batch that computes the same sequences from their first token."""
    lens, size = batch.host_context_lens, batch.block_size
    positions = torch.cat([torch.arange(length) for length in lens])
    rows = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    return dataclasses.replace(
        batch,
        positions=positions,
        slots=batch.block_tables[rows, positions // size].long() * size + positions % size,
        query_starts=torch.tensor([0, *lens]).cumsum(0).to(torch.int32),
        num_single=lens.count(1),
        query_lens=lens,
    )


def ends(rows: Tensor, lens: Sequence[tuple[int, int]]) -> Tensor:
    """Return the last `queries` of the `context` rows of each sequence."""
    parts = rows.split([context for _, context in lens])
    return torch.cat([part[-queries:] for part, (queries, _) in zip(parts, lens, strict=True)])


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"q_rank": None}, {"interleaved": False}, {"kv_rank": 7, "nope_dim": 3}, {"value_dim": 1, "q_rank": 1}],
    ids=str,
)
def test_the_absorbed_form_gives_the_results_of_the_expanded_form(
    kernels: Kernels, dtype: torch.dtype, changes: dict[str, object]
) -> None:
    latent = dataclasses.replace(LATENT, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    weights = make_weights(latent, dtype)
    attention = make_attention(latent, weights, kernels, dtype)
    batch, slots = make_batch(LENS, 16, torch.Generator().manual_seed(1))
    rows = torch.full((slots, 1, latent.cached_dim), torch.nan, dtype=dtype)
    cache = KVCache(rows, rows)
    whole = prefix_batch(batch)
    x = torch.randn(len(whole.positions), HIDDEN).to(dtype)
    wanted = torch.cat([expanded(latent, weights, part) for part in x.split(whole.query_lens)])
    tolerance = 2e-5 if dtype == torch.float32 else 0.06
    assert float((attention(x, whole, cache).double() - wanted).abs().max()) < tolerance
    found = attention(ends(x, LENS), batch, cache)
    assert found.dtype == dtype
    assert float((found.double() - ends(wanted, LENS)).abs().max()) < tolerance
    assert float(wanted.std()) > 0.2
    used = whole.slots.unique()
    assert rows[used].isfinite().all()
    assert int(rows.isfinite().all(-1).sum()) == len(used)  # no other rows were written


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoded_row_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    assert NATIVE is not None
    torch.manual_seed(0)
    attention = make_attention(LATENT, make_weights(LATENT, dtype), NATIVE, dtype)
    lens = [(1, context) for context in (1, 2, 17, 300, 290)]
    batch, slots = make_batch(lens, 16, torch.Generator().manual_seed(1))
    rows = torch.randn(slots, 1, LATENT.cached_dim).to(dtype)
    x = torch.randn(len(lens), HIDDEN).to(dtype)
    together = attention(x, batch, KVCache(rows, rows))
    for i in range(len(lens)):
        alone = dataclasses.replace(
            batch,
            positions=batch.positions[i : i + 1],
            slots=batch.slots[i : i + 1],
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=batch.context_lens[i : i + 1],
            block_tables=batch.block_tables[i : i + 1],
            num_single=1,
            query_lens=(1,),
            host_context_lens=batch.host_context_lens[i : i + 1],
        )
        assert torch.equal(attention(x[i : i + 1], alone, KVCache(rows, rows)), together[i : i + 1])
