"""Latent attention: one short row per token, the latent, is cached, and stands for the keys and values of all heads.

Keys and values are never computed (the absorbed form of DeepSeek-V2, 2024). The matrix that would turn latents into the
keys of a head is multiplied into its queries instead; the matrix that would turn them into values is applied to the
weighted sum of latents. So all heads attend over one KV head, whose values are the first dimensions of its keys.
"""

from functools import partial

import torch
from torch import Tensor

from shoal.kernels.base import AttentionParams, HeadLayout, Kernels, KVCache, Norm, PagedBatch, Rope
from shoal.kernels.kv_rows import store_rows
from shoal.kernels.linear import HeadLinear, Linear
from shoal.kernels.native_calls import compute
from shoal.kernels.reference import rotate
from shoal.models.spec import LatentSpec
from shoal.parallel.linear import RowParallelLinear


class LowRankLinear:
    """A linear layer of low rank: a projection down, a norm, and a projection up."""

    def __init__(self, down: Linear, norm: Norm, up: Linear, kernels: Kernels) -> None:
        self.down = down
        self.norm = norm
        self.up = up
        self.kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self.up(self.kernels.norm(self.down(x), self.norm))


class LatentAttention:
    """Latent attention for the heads of one rank.

    Args:
        queries: computes the queries, [n, heads * (nope_dim + rope_dim)].
        kv_down: computes the latent and the shared key of each token, [n, kv_rank + rope_dim].
        k_up: turns the first nope_dim values of each head's query into kv_rank values.
        v_up: turns the kv_rank values that each head saw into value_dim values.
    """

    def __init__(
        self,
        latent: LatentSpec,
        queries: Linear,
        kv_down: Linear,
        kv_norm: Norm,
        k_up: HeadLinear,
        v_up: HeadLinear,
        out: RowParallelLinear,
        rope: Rope,
        heads: HeadLayout,
        params: AttentionParams,
        kernels: Kernels,
    ) -> None:
        self.latent = latent
        self.queries = queries
        self.kv_down = kv_down
        self.kv_norm = kv_norm
        self.k_up = k_up
        self.v_up = v_up
        self.out = out
        self.rope = rope
        self.heads = heads
        self.params = params
        self.kernels = kernels

    def attend(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        """Return the output of this rank's heads, [n, heads * value_dim], and store the tokens' latents."""
        heads, size = self.heads, self.latent.cached_dim
        prepare = partial(self._prepare, batch=batch, cache=cache)
        q = compute(prepare, self.queries(x), (len(x), heads.q_heads, size), self.kv_down(x))
        seen = self.kernels.attend(q, heads, self.params, batch, cache)
        return compute(self._values, seen, (len(x), heads.q_heads * self.latent.value_dim))

    def _prepare(self, queries: Tensor, rows: Tensor, *, batch: PagedBatch, cache: KVCache) -> Tensor:
        """Store the latents and keys, `rows`, and return the queries that are multiplied with them."""
        latent = self.latent
        cos, sin = self.rope.cos[batch.positions].unsqueeze(1), self.rope.sin[batch.positions].unsqueeze(1)
        self._store(rows, cos, sin, batch, cache)
        q = queries.view(len(queries), self.heads.q_heads, latent.query_dim)
        rotated = rotate(self._pairs_as_halves(q[..., latent.nope_dim :]), cos, sin)
        return torch.cat((self.k_up(q[..., : latent.nope_dim]), rotated), dim=-1)

    def _values(self, seen: Tensor) -> Tensor:
        """Return the values of all heads, for the weighted sums of latents."""
        seen = seen.view(len(seen), self.heads.q_heads, self.latent.cached_dim)
        return self.v_up(seen[..., : self.latent.kv_rank]).flatten(1)

    def __call__(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        return self.out(self.attend(x, batch, cache))

    def _store(self, rows: Tensor, cos: Tensor, sin: Tensor, batch: PagedBatch, cache: KVCache) -> None:
        latents, keys = rows.split([self.latent.kv_rank, self.latent.rope_dim], dim=1)
        keys = rotate(self._pairs_as_halves(keys).unsqueeze(1), cos, sin).squeeze(1)
        cached = torch.cat((self.kernels.norm(latents, self.kv_norm), keys), dim=1)
        # A rank without query heads has no KV head either, and stores nothing.
        cached = cached.unsqueeze(1).expand(-1, self.heads.kv_heads, -1)
        store_rows(cached, batch.slots, cache.keys, cache.key_scales)

    def _pairs_as_halves(self, x: Tensor) -> Tensor:
        """Return `x` with its dimensions reordered so that pairs of neighbours become i and i + rope_dim / 2.

        Queries and keys are reordered in the same way, so their scores do not change.
        """
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.latent.interleaved else x
