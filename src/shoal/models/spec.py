"""A model as data: one shape for every family. Free of torch.

Nothing here is named after a family. What a family needs is a value of a field; what none of them can say is
`Unsupported`, and left to transformers' own implementation.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.errors import CheckpointError

Config = Mapping[str, Any]

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
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
    `high_freq_factor` of llama3, `short_factors` of longrope, and what else follows of yarn.
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
    short_factors: tuple[float, ...] = ()  # each pair of dimensions is stretched by one of them
    # In a text longer than this, every token is turned by other angles (longrope, dynamic); None: never.
    steady_positions: int | None = None


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
class LatentSpec:
    """Attention whose keys and values are made of one latent a token (MLA; DeepSeek-V2, 2024).

    A token is led down to `kv_rank` values, which are normed and cached, and to one rotated key of `rope_dim` for all
    heads, which is cached behind them. A head's key is `nope_dim` values made of the latent, then the rotated key; its
    value is `value_dim` values made of the latent. Queries may be led down to `q_rank` values, normed, and up again.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rope: RopeSpec
    norm: NormSpec  # of latents and of queries that are led down
    interleaved: bool  # rotated dimensions 2i and 2i + 1 are a pair, else i and i + rope_dim / 2

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def cached_dim(self) -> int:
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """How a token chooses `top_k` of the experts.

    Scores are made of the router's logits by `scoring`, over all experts. The best are chosen, where the model has a
    `correction_bias` by score and bias together; their weights are the scores alone, which `normalize` makes sum to 1,
    times `scale`.
    With `groups` the experts are so many equal parts, one behind the other, and only those in the best `top_groups` of
    them can be chosen; a group is as good as its best expert, or as its best two together.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    correction_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"
    wide: bool = False  # the logits are computed in float32, whatever the type of the model


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture of experts, which stands for the MLP in some layers, in layouts with attention and MLP one by one. An
    expert is an MLP without biases, gated and activated like the model's own."""

    num_experts: int
    intermediate_size: int  # of one expert
    routing: RoutingSpec
    layers: tuple[bool, ...]  # of each layer: is it a mixture? Else it has the model's MLP
    shared_size: int = 0  # intermediate size of the shared experts together, which see every token; 0: there are none
    shared_gate: bool = False  # what they give is scaled by the sigmoid of a linear layer's one output

    def __post_init__(self) -> None:
        routing = self.routing
        if self.num_experts % routing.groups:
            raise CheckpointError(f"config.json: {self.num_experts} experts do not divide into {routing.groups} groups")
        if routing.top_groups > routing.groups:
            raise CheckpointError(
                f"config.json: the best {routing.top_groups} groups of {routing.groups} are asked for"
            )
        choice = self.num_experts // routing.groups * routing.top_groups
        if routing.top_k > choice:
            raise CheckpointError(f"config.json: a token takes {routing.top_k} experts, of {choice} to choose from")


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
    residual_scale: float | None = None  # of what a sublayer adds; in layouts with attention and MLP one by one
    position_offset: int | None = None  # learned positions, of which the first has this row; None: no such table
    logit_scale: float | None = None  # logits are multiplied by it, before the soft cap
    logit_softcap: float | None = None
    moe: MoESpec | None = None
    # Heads then share one cached row a token: there is one KV head, and head_dim is the row's length.
    latent: LatentSpec | None = None
    # Texts may be no longer than this, whatever `max_positions` says: see `RopeSpec.steady_positions`.
    steady_positions: int | None = None
    stretched_by: str = ""  # how more positions than max_position_embeddings came about; "": they did not

    @property
    def cached_per_token(self) -> int:
        """Tensors [kv_heads, head_dim] that a layer caches a token: a key and a value, or what is both."""
        return 2 if self.latent is None else 1

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

    def moe_of(self, layer: int) -> MoESpec | None:
        """None: the layer has an MLP."""
        return self.moe if self.moe is not None and self.moe.layers[layer] else None


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a checkpoint spells a mixture's tensors, behind the names of a layer and in full.

    {e} is an expert's number. Without it a tensor has the matrices of all experts, [experts, out, in]. Where `up` has
    one name for two matrices, these are one above the other. The shared experts are spelled like an MLP, without
    `.weight`.
    """

    router: str = "mlp.gate.weight"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    up: tuple[str, ...] = ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight")
    down: str = "mlp.experts.{e}.down_proj.weight"
    shared_up: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"

    def stacked(self) -> "ExpertNames":
        """The same with one tensor for all experts, as transformers 5 has them in memory."""
        return dataclasses.replace(self, up=("mlp.experts.gate_up_proj",), down="mlp.experts.down_proj")


@dataclass(frozen=True, slots=True)
class LatentNames:
    """How a checkpoint spells the tensors of latent attention, like `TensorNames`. `kv_down` has latent and rotated
    key one above the other; `kv_up` in turn, head by head, what makes the key and what makes the value."""

    q: str = "self_attn.q_proj"  # where queries are not led down
    q_down: str = "self_attn.q_a_proj"
    q_norm: str = "self_attn.q_a_layernorm"
    q_up: str = "self_attn.q_b_proj"
    kv_down: str = "self_attn.kv_a_proj_with_mqa"
    kv_norm: str = "self_attn.kv_a_layernorm"
    kv_up: str = "self_attn.kv_b_proj"


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
    latent: LatentNames = LatentNames()
    experts: ExpertNames = ExpertNames()
    prefix: str = "model."
    head: str = "lm_head"


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """One file in `families/`: which architectures it reads, and how.

    `model_type` is config.json's, which decides where no architecture is named.
    `prefixes`, `heads` and `experts` are the spellings of `TensorNames.prefix`, `.head` and `.experts` that are in use,
    the usual one first.
    """

    architectures: tuple[str, ...]
    model_type: str
    read: Callable[[Config], ModelSpec]
    names: TensorNames = TensorNames()
    prefixes: tuple[str, ...] = ("model.", "", "language_model.model.", "model.language_model.")
    heads: tuple[str, ...] = ("lm_head", "language_model.lm_head")
    experts: tuple[ExpertNames, ...] = (ExpertNames(), ExpertNames().stacked())
