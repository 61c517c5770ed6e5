"""A model as data: what `config.json` says, in one shape for every family. Free of torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.errors import CheckpointError

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. The last three are of llama3's scaling, `factor` of linear's and llama3's."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


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
    norm_eps: float
    rope: RopeSpec
    tie_embeddings: bool
    dtype: str
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True, slots=True)
class TensorNames:
    """How a family spells its tensors in checkpoints; `{i}` is the layer."""

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{i}."
    input_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    post_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


@dataclass(frozen=True, slots=True)
class Family:
    """One file in `families/`: which architectures it reads, and how."""

    architectures: tuple[str, ...]
    read: Callable[[Config], ModelSpec]
    names: TensorNames = TensorNames()


def positive(config: Config, key: str, default: int | None = None) -> int:
    """A size out of config.json.

    Raises:
        CheckpointError: missing, not an integer, or not positive.
    """
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def rope(config: Config) -> RopeSpec:
    """Reads old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`) spellings.

    Raises:
        CheckpointError: a kind of scaling that is not supported.
    """
    parameters: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return RopeSpec(theta)
    if kind == "linear":
        return RopeSpec(theta, "linear", float(parameters["factor"]))
    if kind == "llama3":
        return RopeSpec(
            theta,
            "llama3",
            float(parameters["factor"]),
            float(parameters["low_freq_factor"]),
            float(parameters["high_freq_factor"]),
            int(parameters["original_max_position_embeddings"]),
        )
    raise CheckpointError(f"config.json: rope scaling {kind!r} is not supported; supported are default, linear, llama3")


def dtype_name(config: Config) -> str:
    """`dtype` (or `torch_dtype`), float32 where config.json says nothing."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
