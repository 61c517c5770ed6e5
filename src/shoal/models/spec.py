"""A model as data: one shape for every dense family. Free of torch.

Nothing here is named after a family. What a family needs is a value of a field; what none of them can say is
`Unsupported`, and left to transformers' own implementation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.errors import CheckpointError

Config = Mapping[str, Any]

RopeKind = Literal["default", "linear", "llama3", "yarn"]
NormKind = Literal["rms", "rms_wide", "layer"]  # what they mean: kernels.base.Norm
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

# How a layer joins its two sublayers, attention a and MLP m, to the residual stream x:
#   pre           x += a(norm(x)), x += m(norm'(x))
#   post          x += norm(a(x)), x += norm'(m(x))
#   sandwich      x += norm(a(norm'(x))), and the MLP likewise: four norms
#   parallel      x += a(norm(x)) + m(norm'(x))
#   parallel_one  x += a(norm(x)) + m(norm(x)): one norm for both
#   norm_sum      x = norm(x + a(x)), x = norm'(x + m(x)): the first transformer's way
Layout = Literal["pre", "post", "sandwich", "parallel", "parallel_one", "norm_sum"]


class Unsupported(CheckpointError):
    """The model is sound, but asks for what no spec can say: another implementation may run it."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding.

    `factor` is of linear, llama3 and yarn, `original_max_positions` of the last two, `low_freq_factor` and
    `high_freq_factor` of llama3, and what follows of yarn.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # of cos and sin, so that scores grow by its square
    truncate: bool = True  # the ends of the blend are rounded to whole dimensions
    rotary_dim: int | None = None  # how much of a head is rotated; None: all of it


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The attention of one layer. A query sees itself and the `window - 1` tokens before it; None: all of them."""

    scale: float
    rope: RopeSpec | None = None
    window: int | None = None
    softcap: float | None = None  # scores are bent into (-softcap, softcap) by a tanh


@dataclass(frozen=True, slots=True)
class NormSpec:
    """`one_plus`: the file holds w of a weight 1 + w."""

    kind: NormKind
    eps: float
    weight: bool = True
    bias: bool = False
    one_plus: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    attention: tuple[AttentionSpec, ...]  # a pattern: layer i has number i modulo its length
    norm: NormSpec
    tie_embeddings: bool
    dtype: str
    layout: Layout = "pre"
    final_norm: bool = True
    qk_norm: NormSpec | None = None  # of each query and key head, before the rotation
    activation: Activation = "silu"
    gated: bool = True  # activation(gate) * up, else activation(up)
    qkv_bias: bool = False
    out_bias: bool = False
    up_bias: bool = False  # of gate and up
    down_bias: bool = False
    head_bias: bool = False
    embedding_size: int | None = None  # where it is not hidden_size, projections lead in and out
    embedding_scale: float | None = None
    position_offset: int | None = None  # learned positions, of which the first has this row; None: no such table
    logit_softcap: float | None = None

    @property
    def embedding_width(self) -> int:
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def norms_before(self) -> bool:
        """Attention has a norm that the file calls `attention_norm`, and stands before it but in `norm_sum`."""
        return self.layout != "post"

    @property
    def norms_mlp(self) -> bool:
        """The same of the MLP and `mlp_norm`."""
        return self.layout not in ("post", "parallel_one")

    @property
    def norms_after(self) -> bool:
        """What a sublayer adds is normed."""
        return self.layout in ("post", "sandwich")

    def attention_of(self, layer: int) -> AttentionSpec:
        return self.attention[layer % len(self.attention)]


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How a checkpoint spells its tensors, without the `.weight` and `.bias` at the end.

    `layer` stands before the names of a layer ({i} is its number), and `prefix` before everything but the head. Where
    `qkv` or `up` has one name for several matrices, these are one above the other in one tensor; `interleaved`: not as
    wholes, but head by head, its query, key and value. `transposed`: a layer's matrices lie as [in, out].
    """

    embedding: str = "embed_tokens"
    positions: str = "embed_positions"
    project_in: str = "project_in"
    project_out: str = "project_out"
    final_norm: str = "norm"
    layer: str = "layers.{i}."
    attention_norm: str = "input_layernorm"
    attention_out_norm: str = "post_attention_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved: bool = False
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = "post_feedforward_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    transposed: bool = False
    prefix: str = "model."
    head: str = "lm_head"


@dataclass(frozen=True, slots=True)
class Family:
    """One file in `families/`: which architectures it reads, and how.

    `model_type` is config.json's, which decides where no architecture is named.
    `prefixes` and `heads` are the spellings of `TensorNames.prefix` and `.head` that are in use, the usual one first.
    """

    architectures: tuple[str, ...]
    model_type: str
    read: Callable[[Config], ModelSpec]
    names: TensorNames = TensorNames()
    prefixes: tuple[str, ...] = ("model.", "", "language_model.model.")
    heads: tuple[str, ...] = ("lm_head", "language_model.lm_head")
