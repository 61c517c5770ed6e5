"""The spec of a model: everything the decoder needs to know, as data, in one form for all families. Free of torch.

Nothing here is named after a family: a family's features are values of fields. A model with a feature that no field can
express is `Unsupported`, and can only run through transformers' own implementation.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.errors import CheckpointError

Config = Mapping[str, Any]

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
NormKind = Literal["rms", "rms_wide", "layer"]  # explained at kernels.base.Norm
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]

# How a layer adds its two sublayers, attention a and MLP m, to the residual stream x. norm and norm' differ:
#   pre           x += a(norm(x)), x += m(norm'(x))
#   post          x += norm(a(x)), x += norm'(m(x))
#   sandwich      x += norm(a(norm'(x))), and the MLP likewise: four norms
#   parallel      x += a(norm(x)) + m(norm'(x))
#   parallel_one  x += a(norm(x)) + m(norm(x)): one norm for both
#   norm_sum      x = norm(x + a(x)), x = norm'(x + m(x)), as in the original transformer
Layout = Literal["pre", "post", "sandwich", "parallel", "parallel_one", "norm_sum"]


class Unsupported(CheckpointError):
    """The model is valid, but has a feature that no spec can express. Another implementation may be able to run it."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding.

    Which fields count depends on `kind`. linear: `factor`; llama3: `factor`, `original_max_positions`,
    `low_freq_factor`, `high_freq_factor`; yarn: `factor`, `original_max_positions`, `beta_fast`, `beta_slow`,
    `attention_factor`, `truncate`; longrope: `short_factors`, `attention_factor`.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # cos and sin are multiplied by it, so scores grow by its square
    truncate: bool = True  # the ends of the range in which frequencies are blended are rounded to whole dimensions
    rotary_dim: int | None = None  # number of rotated dimensions of a head; None: all
    short_factors: tuple[float, ...] = ()  # one for each pair of dimensions, whose frequency is divided by it
    # In a text longer than this, all tokens are rotated by other angles (longrope, dynamic). None: no such limit.
    steady_positions: int | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The attention of one layer."""

    scale: float  # scores are multiplied by it
    rope: RopeSpec | None = None
    window: int | None = None  # a query sees its own token and `window - 1` tokens before it; None: all before it
    softcap: float | None = None  # scores are limited to (-softcap, softcap) by a tanh


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A norm."""

    kind: NormKind
    eps: float
    weight: bool = True
    bias: bool = False
    one_plus: bool = False  # the weight is 1 + w, where w is the tensor in the file


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (MLA; DeepSeek-V2, 2024): keys and values are computed from one latent per token.

    A token is projected down to a latent of `kv_rank` values, which is normed and cached, and to one rotated key of
    `rope_dim` values for all heads, which is cached after it. The key of a head is `nope_dim` values projected up from
    the latent, followed by the rotated key. The value of a head is `value_dim` values projected up from the latent.
    """

    q_rank: int | None  # queries are projected down to this many values, normed, and projected up; None: they are not
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: RopeSpec
    norm: NormSpec  # for latents, and for queries that are projected down
    interleaved: bool  # dimensions 2i and 2i + 1 are rotated as a pair; else i and i + rope_dim / 2

    @property
    def query_dim(self) -> int:
        """The size of one head of a query or key."""
        return self.nope_dim + self.rope_dim

    @property
    def cached_dim(self) -> int:
        """The number of values that are cached per token."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """The rule by which a token chooses `top_k` of the experts, and the weights that these get.

    `scoring` turns the router's logits over all experts into scores. The experts with the highest scores are chosen;
    if the model has a `correction_bias`, it is added to the scores for this choice only. The weights of the chosen
    experts are their scores, divided by their sum if `normalize` is set, times `scale`.

    If there are several `groups`, the experts are divided into that many equal groups of consecutive experts, and only
    experts of the `top_groups` best groups can be chosen. The score of a group is that of its best expert, or the sum
    of its best two.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    correction_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"
    wide: bool = False  # the logits are computed in float32, for any type of the model


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture of experts, which takes the place of the MLP in some layers.

    An expert is an MLP without biases, with the activation and the gate of the model's MLP. Layouts in which attention
    and MLP run in parallel cannot have mixtures.
    """

    num_experts: int
    intermediate_size: int  # of one expert
    routing: RoutingSpec
    layers: tuple[bool, ...]  # for each layer, whether it has the mixture instead of the MLP
    shared_size: int = 0  # intermediate size of all shared experts, which compute every token; 0: there are none
    shared_gate: bool = False  # the result of the shared experts is scaled by the sigmoid of a linear layer

    def __post_init__(self) -> None:
        routing = self.routing
        if self.num_experts % routing.groups:
            raise CheckpointError(
                f"config.json: {self.num_experts} experts can't be divided into {routing.groups} equal groups"
            )
        if routing.top_groups > routing.groups:
            raise CheckpointError(
                f"config.json: a token may choose from {routing.top_groups} groups of experts, but there are only "
                f"{routing.groups}"
            )
        choice = self.num_experts // routing.groups * routing.top_groups
        if routing.top_k > choice:
            raise CheckpointError(
                f"config.json: a token chooses {routing.top_k} experts, but has only {choice} to choose from"
            )


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only language model as data."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    attention: tuple[AttentionSpec, ...]  # a pattern that repeats: layer i has element i % length
    norm: NormSpec
    tie_embeddings: bool
    dtype: str
    layout: Layout = "pre"
    final_norm: bool = True
    qk_norm: NormSpec | None = None  # applied to each query and key head, before the rotation
    activation: Activation = "silu"
    gated: bool = True  # the MLP computes activation(gate) * up; else activation(up)
    qkv_bias: bool = False
    out_bias: bool = False
    up_bias: bool = False  # for gate and up
    down_bias: bool = False
    head_bias: bool = False
    embedding_size: int | None = None  # if it is not hidden_size, there are projections after embedding, before head
    embedding_scale: float | None = None
    residual_scale: float | None = None  # factor of what a sublayer adds to the stream; not in parallel layouts
    position_offset: int | None = None  # row of position 0 in the table of learned positions; None: no such table
    logit_scale: float | None = None  # logits are multiplied by it, before the soft cap
    logit_softcap: float | None = None
    moe: MoESpec | None = None
    # With latent attention all heads share one cached row per token: num_kv_heads is 1, head_dim is the row's length.
    latent: LatentSpec | None = None
    # Texts may not be longer than this, even if `max_positions` is larger: see `RopeSpec.steady_positions`.
    steady_positions: int | None = None
    stretched_by: str = ""  # the scaling that made max_positions larger than max_position_embeddings; "": none did

    @property
    def cached_per_token(self) -> int:
        """The number of tensors [kv_heads, head_dim] cached per token and layer: a key and a value, or one latent."""
        return 2 if self.latent is None else 1

    @property
    def embedding_width(self) -> int:
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def norms_before(self) -> bool:
        """True if a layer has an `attention_norm`. It is applied before attention, except in the layout `norm_sum`."""
        return self.layout != "post"

    @property
    def norms_mlp(self) -> bool:
        """True if a layer has an `mlp_norm`. It is applied before the MLP, except in the layout `norm_sum`."""
        return self.layout not in ("post", "parallel_one")

    @property
    def norms_after(self) -> bool:
        """True if the output of each sublayer is normed before it is added to the residual stream."""
        return self.layout in ("post", "sandwich")

    def attention_of(self, layer: int) -> AttentionSpec:
        """Return the attention of a layer."""
        return self.attention[layer % len(self.attention)]

    def moe_of(self, layer: int) -> MoESpec | None:
        """Return the mixture of experts of a layer, or None if the layer has an MLP."""
        return self.moe if self.moe is not None and self.moe.layers[layer] else None


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """The names of a mixture's tensors in a checkpoint, without the prefix of the layer.

    {e} is the number of an expert; a tensor without it holds the matrices of all experts, [experts, out, in]. If `up`
    has one name, that tensor holds the rows of the gate, then those of up. The names of shared experts have no
    `.weight`, like those of an MLP; the others are complete.
    """

    router: str = "mlp.gate.weight"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    up: tuple[str, ...] = ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight")
    down: str = "mlp.experts.{e}.down_proj.weight"
    shared_up: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"

    def stacked(self) -> "ExpertNames":
        """Return the same names, but with one tensor for all experts, as transformers 5 saves them."""
        return dataclasses.replace(self, up=("mlp.experts.gate_up_proj",), down="mlp.experts.down_proj")


@dataclass(frozen=True, slots=True)
class LatentNames:
    """The names of the tensors of latent attention in a checkpoint, like `TensorNames`.

    `kv_down` holds the rows for the latent, then those for the rotated key. `kv_up` holds for one head after the other
    the rows for its key, then those for its value.
    """

    q: str = "self_attn.q_proj"  # if queries are not projected down
    q_down: str = "self_attn.q_a_proj"
    q_norm: str = "self_attn.q_a_layernorm"
    q_up: str = "self_attn.q_b_proj"
    kv_down: str = "self_attn.kv_a_proj_with_mqa"
    kv_norm: str = "self_attn.kv_a_layernorm"
    kv_up: str = "self_attn.kv_b_proj"


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names of a model's tensors in a checkpoint, without the `.weight` or `.bias` at the end.

    `layer` is the prefix of a layer's tensors, where {i} is the number of the layer; `prefix` is that of all tensors
    but the head. If `qkv` or `up` has one name for several matrices, one tensor holds the rows of all, matrix after
    matrix; or with `interleaved`, for one head after the other the rows of its query, key and value. `transposed`: the
    matrices of layers are stored as [in, out].
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
    latent: LatentNames = LatentNames()
    experts: ExpertNames = ExpertNames()
    prefix: str = "model."
    head: str = "lm_head"


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A family of models: the architectures that it covers, and how their configuration and tensors are read.

    Each family is a file in `families/`. `model_type` is that of config.json, which decides if config.json names no
    architecture. `prefixes`, `heads` and `experts` list the values of `TensorNames.prefix`, `.head` and `.experts` that
    are in use, the usual one first.
    """

    architectures: tuple[str, ...]
    model_type: str
    read: Callable[[Config], ModelSpec]
    names: TensorNames = TensorNames()
    prefixes: tuple[str, ...] = ("model.", "", "language_model.model.", "model.language_model.")
    heads: tuple[str, ...] = ("lm_head", "language_model.lm_head")
    experts: tuple[ExpertNames, ...] = (ExpertNames(), ExpertNames().stacked())
