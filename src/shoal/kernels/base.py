"""The arithmetic behind one interface: what a model computes between its linear layers.

Two implementations exist. `reference` is PyTorch, right on every device; `native` is C++ for the CPU. Both keep the
contract below, and `tests/kernels` holds them against each other.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The tokens of one step, and where their keys and values live.

    `n` tokens of `b` sequences. The queries of a sequence are consecutive; sequences with one query come first, so
    that the first `num_single` rows of every per-token tensor are exactly those sequences.
    """

    positions: Tensor  # int64 [n]: each token's position in its sequence
    slots: Tensor  # int64 [n]: block * block_size + offset, where the token's key and value are written
    query_starts: Tensor  # int32 [b + 1]: first row of each sequence, then n
    context_lens: Tensor  # int32 [b]: cached tokens a sequence's last query sees, its own included
    block_tables: Tensor  # int32 [b, max_blocks]: rows are padded with 0
    block_size: int
    num_single: int
    query_lens: tuple[int, ...]  # the same facts on the host, for loops that launch work
    host_context_lens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVCache:
    """The keys and values of one layer on one rank: [num_slots, kv_heads, head_dim] each, contiguous."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """The attention heads of one rank. `q_to_kv[i]` is the local KV head that local query head i reads."""

    q_heads: int
    kv_heads: int
    head_dim: int
    q_to_kv: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary tables, [max_positions, rotary_dim / 2] in float32; halves are rotated against each other (NeoX style).

    `rotary_dim` may be smaller than the head: the rest of the head passes through.
    """

    cos: Tensor
    sin: Tensor


NormKind = Literal["rms", "rms_wide", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over the last dimension, with weights of its size.

    rms: the normalized row is rounded to x's dtype before the weight, in x's dtype, is applied (Llama).
    rms_wide: weight in float32, all of it computed in float32 and rounded once (Gemma; its 1 + w is in the weight).
    layer: LayerNorm (Ba et al., 2016); weight and bias, if there are any, in x's dtype.
    """

    kind: NormKind
    weight: Tensor | None  # None: ones
    bias: Tensor | None  # of `layer` alone
    eps: float


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Norms over each query head and each key head, [head_dim] weights, applied before the rotation."""

    q: Norm
    k: Norm


@dataclass(frozen=True, slots=True)
class Scores:
    """How the scores of an attention are made: `scale` times the product, bent into (-softcap, softcap) by a tanh, and
    a query sees itself and the `window - 1` tokens before it; None: all of them."""

    scale: float
    window: int | None = None
    softcap: float | None = None


class Kernels(Protocol):
    """Results are new tensors unless said otherwise; sums, norms and softmax are computed in float32."""

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """x: [n, hidden]."""

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), the sum rounded to x's dtype. May write either input."""

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """x: [n, m], and so the result. May write x."""

    def activate_gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """gate_up: [n, 2 * m], gates first. activation(gate) * up: [n, m]."""

    def weighted_sum(self, x: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        """Row i of the result is the sum of weights[i, j] * x[places[i, j]], added up in the order of j.

        x: [p, m]. places: int64 [n, k], below 0 for none; weights: float32 [n, k]. Gives [n, m], summed up in float32
        and rounded once.
        """

    def rotate_and_store(
        self,
        qkv: Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rope: Rope | None,
        batch: PagedBatch,
        cache: KVCache,
    ) -> Tensor:
        """Normalizes and rotates queries and keys, writes keys and values into the cache.

        qkv: [n, (q_heads + 2 * kv_heads) * head_dim], queries, keys, values. Gives queries [n, q_heads, head_dim].
        """

    def attend(self, q: Tensor, heads: HeadLayout, scores: Scores, batch: PagedBatch, cache: KVCache) -> Tensor:
        """Causal attention over the paged cache, which holds this step's keys already.

        q: [n, q_heads, head_dim]. Gives [n, q_heads * head_dim].
        """
