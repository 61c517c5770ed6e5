"""Attention over latents: keys and values of all heads are made of one short row a token, and that row is cached.

Keys and values are never made (the absorbed form of DeepSeek-V2, 2024): what would make a head's key of a latent is
multiplied into its query instead, and what would make its value is applied to what its weights gave of the latents. So
all heads attend over one KV head, whose values are the first dimensions of its keys.
"""

import torch
from torch import Tensor

from shoal.kernels.base import HeadLayout, Kernels, KVCache, Norm, PagedBatch, Rope, Scores
from shoal.kernels.linear import HeadLinear, Linear
from shoal.kernels.reference import rotate
from shoal.models.spec import LatentSpec
from shoal.parallel.linear import RowParallelLinear


class LowRankLinear:
    """Down to few values, a norm over them, and up again."""

    def __init__(self, down: Linear, norm: Norm, up: Linear, kernels: Kernels) -> None:
        self.down = down
        self.norm = norm
        self.up = up
        self.kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self.up(self.kernels.norm(self.down(x), self.norm))


class LatentAttention:
    """`queries` gives [n, heads * (nope_dim + rope_dim)], of this rank's heads; `kv_down` the latent and the shared key
    of each token, [n, kv_rank + rope_dim]. `k_up` makes queries of nope_dim ones of kv_rank, `v_up` values of value_dim
    of a latent's kv_rank."""

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
        scores: Scores,
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
        self.scores = scores
        self.kernels = kernels

    def mix(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        """What this rank's heads see: [n, heads * value_dim]."""
        latent, heads = self.latent, self.heads
        cos, sin = self.rope.cos[batch.positions].unsqueeze(1), self.rope.sin[batch.positions].unsqueeze(1)
        self._store(self.kv_down(x), cos, sin, batch, cache)
        q = self.queries(x).view(len(x), heads.q_heads, latent.query_dim)
        turned = rotate(self._in_halves(q[..., latent.nope_dim :]), cos, sin)
        q = torch.cat((self.k_up(q[..., : latent.nope_dim]), turned), dim=-1)
        seen = self.kernels.attend(q, heads, self.scores, batch, cache).view(q.shape)
        return self.v_up(seen[..., : latent.kv_rank]).flatten(1)

    def __call__(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        return self.out(self.mix(x, batch, cache))

    def _store(self, rows: Tensor, cos: Tensor, sin: Tensor, batch: PagedBatch, cache: KVCache) -> None:
        latents, keys = rows.split([self.latent.kv_rank, self.latent.rope_dim], dim=1)
        keys = rotate(self._in_halves(keys).unsqueeze(1), cos, sin).squeeze(1)
        cached = torch.cat((self.kernels.norm(latents, self.kv_norm), keys), dim=1)
        # A rank without heads has no KV head to store for either.
        cache.keys.index_copy_(0, batch.slots, cached.unsqueeze(1).expand(-1, self.heads.kv_heads, -1))

    def _in_halves(self, x: Tensor) -> Tensor:
        """Pairs of neighbours become pairs of halves. Queries and keys are reordered alike, so scores stay the same."""
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.latent.interleaved else x
