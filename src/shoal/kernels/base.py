"""The interface of the kernels: the operations of a model that are not linear layers.

There are two implementations: `reference` is PyTorch and runs on every device; `native` is C++ for the CPU. Both keep
the contract below, and `tests/kernels` compares them.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The tokens of one step, and the slots of their keys and values in the KV cache.

    There are `n` tokens (queries) of `b` sequences. The queries of a sequence are consecutive. Sequences with a single
    query come first, so the first `num_single` rows of every per-token tensor belong to these.
    """

    positions: Tensor  # int64 [n]: each token's position in its sequence
    slots: Tensor  # int64 [n]: the slot for the token's key and value, which is block * block_size + offset
    query_starts: Tensor  # int32 [b + 1]: the first row of each sequence, then n
    context_lens: Tensor  # int32 [b]: the number of tokens that a sequence's last query attends to, its own included
    block_tables: Tensor  # int32 [b, max_blocks]: what is in a row behind the blocks of its context has no meaning
    block_size: int
    num_single: int
    query_lens: tuple[int, ...]  # on the host: the number of queries of each sequence
    host_context_lens: tuple[int, ...]  # on the host: the same as `context_lens`


@dataclass(frozen=True, slots=True)
class KVCache:
    """The keys and values of one layer on one rank: [num_slots, kv_heads, head_dim] each, contiguous.

    They may have another type than the activations (`kernels.kv_rows`). Rows are read as they are stored, those of the
    same step too. int8 has scales, [num_slots, kv_heads] each, contiguous: one for each row of head_dim numbers.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """The attention heads of one rank. `q_to_kv[i]` is the local KV head that local query head i reads."""

    q_heads: int
    kv_heads: int
    head_dim: int
    q_to_kv: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary tables, float32 [max_positions, rotary_dim / 2].

    Element i of a head is rotated with element i + rotary_dim / 2 (NeoX style). `rotary_dim` may be smaller than the
    head, whose other elements do not change.
    """

    cos: Tensor
    sin: Tensor


NormKind = Literal["rms", "rms_wide", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over the last dimension, with weights of its size.

    rms: RMSNorm. The normalized row is rounded to x's dtype, then multiplied with the weight in that dtype (Llama).
    rms_wide: RMSNorm with a float32 weight, computed in float32 and rounded once (Gemma; the weight includes its 1 +).
    layer: LayerNorm (Ba et al., 2016). Weight and bias are optional, and have x's dtype.
    """

    kind: NormKind
    weight: Tensor | None  # None: ones
    bias: Tensor | None  # only for `layer`
    eps: float


@dataclass(frozen=True, slots=True)
class QKNorm:
    """Norms of each query head and each key head, with weights [head_dim]. They are applied before the rotation."""

    q: Norm
    k: Norm


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """The parameters of an attention layer.

    A score is `scale` times the product of query and key, and with a softcap softcap * tanh(score / softcap). A query
    attends to itself and the `window - 1` tokens before it, or to all tokens before it without a window.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class Routing(Protocol):
    """The rule by which a token chooses experts: `shoal.models.spec.RoutingSpec` says what its parts mean."""

    @property
    def top_k(self) -> int: ...

    @property
    def scoring(self) -> Literal["softmax", "sigmoid"]: ...

    @property
    def normalize(self) -> bool: ...

    @property
    def scale(self) -> float: ...

    @property
    def groups(self) -> int: ...

    @property
    def top_groups(self) -> int: ...

    @property
    def group_score(self) -> Literal["best", "best_two"]: ...


@dataclass(frozen=True, slots=True)
class ExpertPairs:
    """Pairs of a row and one of its experts, sorted by experts, and for each expert by rows."""

    counts: list[int]  # by expert: the number of its pairs
    rows: Tensor  # int64 [pairs with an expert]: the row of each
    places: Tensor  # int64 [m, k]: where each pair of a row is among them; negative without an expert


class Kernels(Protocol):
    """The operations between linear layers.

    Results are new tensors unless the docstring says otherwise. Sums, norms and softmax are computed in float32.
    """

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Normalize each row of x: [n, hidden]."""

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """Return norm(x + residual) and x + residual, the sum rounded to x's dtype. May overwrite both inputs."""

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """Apply the activation to each element of x: [n, m]. May overwrite x."""

    def activate_gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """Return activation(gate) * up: [n, m]. gate_up: [n, 2 * m], the gates first."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Return x + y, rounded to x's dtype: [n, m]. y: [n, m], or [m] for each row. May overwrite x."""

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """Return x * factor, where the factor is rounded to float32: [n, m]. May overwrite x."""

    def weighted_sum(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Return, as row i, the sum of weights[i, j] * x[indices[i, j]] over j, added in the order of j.

        x: [p, m]. indices: int64 [n, k]; negative ones are left out. weights: float32 [n, k]. Gives [n, m], summed in
        float32 and rounded once.
        """

    def route(self, logits: Tensor, rule: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the experts of each token, int64 [n, top_k], the best first, and their weights, float32 [n, top_k].

        The result for a token does not depend on other tokens.

        Args:
            logits: [n, experts].
            bias: float32 [experts], added to the scores for the choice only; None for none.
        """

    def group_pairs(self, experts: Tensor, count: int) -> ExpertPairs:
        """Sort the pairs of rows and experts. experts: int64 [m, k], from 0 to count - 1; -1: none."""

    def rotate_and_store(
        self,
        qkv: Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rope: Rope | None,
        batch: PagedBatch,
        cache: KVCache,
    ) -> Tensor:
        """Normalize and rotate queries and keys, write keys and values into the cache, and return the queries.

        Keys are rounded to the type of qkv, then to that of the cache.

        qkv: [n, (q_heads + 2 * kv_heads) * head_dim]: queries, keys, values. Gives [n, q_heads, head_dim].
        """

    def attend(
        self, q: Tensor, heads: HeadLayout, params: AttentionParams, batch: PagedBatch, cache: KVCache
    ) -> Tensor:
        """Compute causal attention over the paged KV cache, which already contains this step's keys and values.

        q: [n, q_heads, head_dim]. Gives [n, q_heads * head_dim].
        """
