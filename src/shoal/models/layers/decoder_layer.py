"""The layers of a decoder, in the layouts in which attention and MLP are added to the residual stream.

A layer takes and returns two tensors [n, hidden] whose sum is the residual stream: the output of the last sublayer, and
the stream before it. So the addition and the norm after it can be one operation, even across layers.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.base import AttentionParams, HeadLayout, Kernels, KVCache, Norm, PagedBatch, QKNorm, Rope
from shoal.kernels.linear import Linear
from shoal.kernels.native_calls import compute
from shoal.parallel.linear import RowParallelLinear, RowParallelSum


class Attention:
    """Attention with queries, keys and values for each head."""

    def __init__(
        self,
        qkv: Linear,
        out: RowParallelLinear,
        norm: QKNorm | None,
        rope: Rope | None,
        heads: HeadLayout,
        params: AttentionParams,
        kernels: Kernels,
    ) -> None:
        self.qkv = qkv
        self.out = out
        self.norm = norm
        self.rope = rope
        self.heads = heads
        self.params = params
        self.kernels = kernels

    def attend(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        """Return the output of this rank's heads, [n, q_heads * head_dim], and store their keys and values."""
        q = self.kernels.rotate_and_store(self.qkv(x), self.heads, self.norm, self.rope, batch, cache)
        return self.kernels.attend(q, self.heads, self.params, batch, cache)

    def __call__(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        return self.out(self.attend(x, batch, cache))


class SelfAttention(Protocol):
    """The attention of a layer. A call applies `attend` and then `out`, which sums over the ranks."""

    out: RowParallelLinear

    def attend(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor:
        """Return the output of this rank's heads, [n, heads * size of a value]."""

    def __call__(self, x: Tensor, batch: PagedBatch, cache: KVCache) -> Tensor: ...


class MLP:
    """An MLP, cut over tensor-parallel ranks. In a model with gates `up` returns the gates and then the values."""

    def __init__(self, up: Linear, activate: Callable[[Tensor], Tensor], down: RowParallelLinear) -> None:
        self.up = up
        self.activate = activate
        self.down = down

    def expand(self, x: Tensor) -> Tensor:
        """Return this rank's columns of the activation: [n, intermediate]."""
        return self.activate(self.up(x))

    def __call__(self, x: Tensor) -> Tensor:
        return self.down.after(self.expand, x)

    def join(self) -> None:
        """Do nothing: ranks of different replicas do not compute an MLP together."""


class FeedForward(Protocol):
    """The sublayer after attention: an MLP or a mixture of experts."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute [n, hidden] from x: [n, hidden]. n may be 0."""

    def join(self) -> None:
        """Take part, without tokens, in a step that ranks of several replicas compute together."""


class Layer(Protocol):
    """A layer of a decoder."""

    def __call__(self, x: Tensor, residual: Tensor, batch: PagedBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Compute the layer. Of arguments and of results the sum, x + residual, is the residual stream."""

    def join(self) -> None:
        """Take part in a step without tokens (see `FeedForward.join`)."""


class Norms:
    """The norms around one sublayer: before it, after it, or both. The sublayer's output is multiplied by `scale`."""

    def __init__(self, before: Norm | None, after: Norm | None, kernels: Kernels, scale: float | None = None) -> None:
        self.before = before
        self.after = after
        self.kernels = kernels
        self.scale = scale

    def enter(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of the sublayer, and the residual stream."""
        if self.before is None:
            stream = self.kernels.add(x, residual)
            return stream, stream
        return self.kernels.add_norm(x, residual, self.before)

    def leave(self, x: Tensor) -> Tensor:
        """Return what is added to the residual stream for the sublayer's output `x`."""
        x = x if self.after is None else self.kernels.norm(x, self.after)
        return x if self.scale is None else self.kernels.scale(x, self.scale)


class SerialLayer:
    """A layer with attention and then the MLP, which reads the stream after attention was added."""

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
    """A layer with attention and MLP in parallel, on the same stream (GPT-J; Wang and Komatsuzaki, 2021).

    If `mlp_norm` is None, both read the output of one norm.
    """

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
        return self.out(self.attention.attend(x, batch, cache), expanded), residual

    def join(self) -> None:
        self.mlp.join()


class NormSumLayer:
    """A layer whose norms are applied to the stream itself, after each addition (Vaswani et al., 2017)."""

    def __init__(
        self, attention: SelfAttention, attention_norm: Norm, mlp: FeedForward, mlp_norm: Norm, kernels: Kernels
    ) -> None:
        self.attention = attention
        self.attention_norm = attention_norm
        self.mlp = mlp
        self.mlp_norm = mlp_norm
        self.kernels = kernels

    def __call__(self, x: Tensor, residual: Tensor, batch: PagedBatch, cache: KVCache) -> tuple[Tensor, Tensor]:
        stream = self.kernels.add(x, residual)
        stream, _ = self.kernels.add_norm(self.attention(stream, batch, cache), stream, self.attention_norm)
        stream, _ = self.kernels.add_norm(self.mlp(stream), stream, self.mlp_norm)
        return compute(torch.zeros_like, stream, stream.shape), stream

    def join(self) -> None:
        self.mlp.join()
