"""The layers of a decoder, and the ways in which they join attention and MLP to the residual stream.

A layer takes and gives two tensors [n, hidden] whose sum is the residual stream: what was added last, and the rest.
So that addition and the norm that follows it are one operation, across layers too.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.base import HeadLayout, Kernels, KVCache, Norm, PagedBatch, QKNorm, Rope, Scores
from shoal.kernels.linear import Linear
from shoal.parallel.linear import RowParallelLinear, RowParallelSum


class Attention:
    def __init__(
        self,
        qkv: Linear,
        out: RowParallelLinear,
        norm: QKNorm | None,
        rope: Rope | None,
        heads: HeadLayout,
        scores: Scores,
        kernels: Kernels,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.norm = norm
        self.rope = rope
        self.heads = heads
        self.scores = scores
        self.kernels = kernels

    def mix(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        """What this rank's heads see: [n, q_heads * head_dim]."""
        q = self.kernels.rotate_and_store(self.qkv(x), self.heads, self.norm, self.rope, batch, cache)
        return self.kernels.attend(q, self.heads, self.scores, batch, cache)

    def __call__(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        return self.out(self.mix(x, batch, cache))


class SelfAttention(Protocol):
    """`mix` is what this rank's heads see, which `out` sums over ranks; a call does both."""

    out: RowParallelLinear

    def mix(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor: ...

    def __call__(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor: ...


class MLP:
    """`activate` takes what `up` gives, which with a gate is gates and values side by side."""

    def __init__(self, up: Linear, activate: Callable[[Tensor], Tensor], down: RowParallelLinear) -> None:
        self.up = up
        self.activate = activate
        self.down = down

    def expand(self, x: Tensor) -> Tensor:
        """This rank's columns: [n, intermediate]."""
        return self.activate(self.up(x))

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.expand(x))

    def join(self) -> None:
        """An MLP concerns the ranks of one replica alone."""


class FeedForward(Protocol):
    """What follows attention: an MLP, or a mixture of experts."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, hidden], n may be 0. Gives [n, hidden]."""

    def join(self) -> None:
        """Takes part, without tokens, in what ranks of other replicas compute together."""


class Layer(Protocol):
    def __call__(self, x: Tensor, residual: Tensor, batch: PagedBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
        """x + residual is the residual stream before and after."""

    def join(self) -> None:
        """Like that of its feed-forward part."""


class Norms:
    """The norms around one sublayer: before it, after it, or both. `scale` is of what the sublayer adds."""

    def __init__(self, before: Norm | None, after: Norm | None, kernels: Kernels, scale: float | None = None) -> None:
        self.before = before
        self.after = after
        self.kernels = kernels
        self.scale = scale

    def enter(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What the sublayer reads, and the residual stream."""
        if self.before is None:
            stream = x + residual
            return stream, stream
        return self.kernels.add_norm(x, residual, self.before)

    def leave(self, x: Tensor) -> Tensor:
        """What the sublayer adds."""
        x = x if self.after is None else self.kernels.norm(x, self.after)
        return x if self.scale is None else x * self.scale


class SerialLayer:
    """Attention, then the MLP on what it left."""

    def __init__(self, attention_norms: Norms, attention: SelfAttention, mlp_norms: Norms, mlp: FeedForward) -> None:
        self.attention_norms = attention_norms
        self.attention = attention
        self.mlp_norms = mlp_norms
        self.mlp = mlp

    def __call__(self, x: Tensor, residual: Tensor, batch: PagedBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norms.enter(x, residual)
        x = self.attention_norms.leave(self.attention(x, batch, cache))
        x, residual = self.mlp_norms.enter(x, residual)
        return self.mlp_norms.leave(self.mlp(x)), residual

    def join(self) -> None:
        self.mlp.join()


class ParallelLayer:
    """Attention and the MLP on the same stream (GPT-J, Wang and Komatsuzaki, 2021). `mlp_norm` None: the same norm."""

    def __init__(self, norm: Norm, attention: SelfAttention, mlp_norm: Norm | None, mlp: MLP, kernels: Kernels) -> None:
        self.norm = norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.out = RowParallelSum(attention.out, mlp.down)
        self.kernels = kernels

    def __call__(self, x: Tensor, residual: Tensor, batch: PagedBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
        x, residual = self.kernels.add_norm(x, residual, self.norm)
        expanded = self.mlp.expand(x if self.mlp_norm is None else self.kernels.norm(residual, self.mlp_norm))
        return self.out(self.attention.mix(x, batch, cache), expanded), residual

    def join(self) -> None:
        self.mlp.join()


class NormSumLayer:
    """The norm comes after the addition, and changes the stream itself (Vaswani et al., 2017)."""

    def __init__(
        self, attention: SelfAttention, attention_norm: Norm, mlp: FeedForward, mlp_norm: Norm, kernels: Kernels
    ) -> None:
        self.attention = attention
        self.attention_norm = attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm
        self.kernels = kernels

    def __call__(self, x: Tensor, residual: Tensor, batch: PagedBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
        stream = x + residual
        stream, _ = self.kernels.add_norm(self.attention(stream, batch, cache), stream, self.attention_norm)
        stream, _ = self.kernels.add_norm(self.mlp(stream), stream, self.mlp_norm)
        return torch.zeros_like(stream), stream

    def join(self) -> None:
        self.mlp.join()
