"""Reading fields of config.json: old and new spellings, and what transformers takes where one is missing.

A field that is null counts as missing, but where it says "none" of something (`optional`).
"""

import math
from collections.abc import Sequence
from typing import Any

from shoal.errors import CheckpointError
from shoal.models.spec import Activation, Config, RopeSpec, Unsupported

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def positive(config: Config, key: str, default: int | None = None) -> int:
    """A size.

    Raises:
        CheckpointError: missing, not an integer, or not positive.
    """
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def whole(config: Config, key: str, default: int) -> int:
    """A number of something, which may be 0.

    Raises:
        CheckpointError: not an integer, or negative.
    """
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"config.json: {key} must be an integer of at least 0, got {value!r}")
    return value


def number(config: Config, key: str, default: float | None = None) -> float:
    """A positive number.

    Raises:
        CheckpointError: missing, not a number, not positive, or not finite.
    """
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)


def optional(config: Config, key: str, default: float | None) -> float | None:
    """A positive number, or null for none.

    Raises:
        CheckpointError: something else.
    """
    value = config.get(key, default)
    return None if value is None else number(config, key, value)


def window(config: Config, default: int | None) -> int | None:
    """`sliding_window` in tokens, or null for none."""
    return None if config.get("sliding_window", default) is None else positive(config, "sliding_window", default)


def head_dim_of(hidden: int, heads: int) -> int:
    """Raises:
    CheckpointError: the hidden size does not divide by the heads.
    """
    if hidden % heads:
        raise CheckpointError(f"config.json: a hidden size of {hidden} does not divide by {heads} attention heads")
    return hidden // heads


def flag(config: Config, key: str, default: bool) -> bool:
    value = config.get(key)
    return default if value is None else bool(value)


def activation(config: Config, default: str, *keys: str) -> Activation:
    """Under the first of `keys` that is there.

    Raises:
        Unsupported: none that the kernels have.
    """
    name = next((config[key] for key in keys if config.get(key) is not None), default)
    if name not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        raise Unsupported(f"config.json: {keys[0]} {name!r} is not supported; supported are {supported}")
    return _ACTIVATIONS[name]


def dtype_name(config: Config) -> str:
    """`dtype` (or `torch_dtype`), float32 where config.json says nothing."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def layer_types(config: Config, default: Sequence[bool]) -> list[bool]:
    """Which layers have a sliding window.

    Raises:
        Unsupported: `layer_types` names another kind of attention.
        CheckpointError: it has not one name for each layer.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return list(default)
    known = {"full_attention": False, "sliding_attention": True}
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise CheckpointError(f"config.json: layer_types must be a list of {len(default)} names, got {kinds!r}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise Unsupported(f"config.json: layer type {kind!r} is not supported; supported are {', '.join(known)}")
    return [known[kind] for kind in kinds]


def rope(
    config: Config,
    head_dim: int,
    *,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
    partial: float = 1.0,
    partial_key: str = "partial_rotary_factor",
    layer_type: str = "full_attention",
) -> RopeSpec:
    """Reads old (`rope_theta`, `rope_scaling`) and new (`rope_parameters`) spellings; `theta` and `partial` are what
    the family takes where nothing is said. `rope_parameters` may say something else for each layer type.

    Raises:
        Unsupported: a kind of scaling that is none of RopeSpec's.
        CheckpointError: a value that makes no sense.
    """
    parameters: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if layer_type in parameters:
        parameters = dict(parameters[layer_type] or {})
    share = number(parameters, "partial_rotary_factor", number(config, partial_key, partial))
    return _scaled_rope(
        parameters,
        theta=number(parameters, "rope_theta", number(config, theta_key, theta)),
        rotary_dim=_rotary_dim(head_dim, share),
        max_positions=config.get("max_position_embeddings"),
    )


def _rotary_dim(head_dim: int, share: float) -> int | None:
    """None: the whole head."""
    dim = int(head_dim * share)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise CheckpointError(
            f"config.json: {dim} of a head's {head_dim} dimensions are rotated; it must be an even number of them"
        )
    return None if dim == head_dim else dim


def _scaled_rope(parameters: Config, *, theta: float, rotary_dim: int | None, max_positions: Any) -> RopeSpec:
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return RopeSpec(theta, rotary_dim=rotary_dim)
    if kind == "linear":
        return RopeSpec(theta, "linear", number(parameters, "factor"), rotary_dim=rotary_dim)
    if kind == "llama3":
        return _llama3(parameters, theta, rotary_dim, max_positions)
    if kind == "yarn":
        return _yarn(parameters, theta, rotary_dim, max_positions)
    raise Unsupported(
        f"config.json: rope scaling {kind!r} is not supported; supported are default, linear, llama3, yarn"
    )


def _llama3(parameters: Config, theta: float, rotary_dim: int | None, max_positions: Any) -> RopeSpec:
    low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
    if low >= high:
        raise CheckpointError(f"config.json: low_freq_factor {low:g} must be less than high_freq_factor {high:g}")
    original = positive(parameters, "original_max_position_embeddings", max_positions)
    return RopeSpec(theta, "llama3", number(parameters, "factor"), low, high, original, rotary_dim=rotary_dim)


def _yarn(parameters: Config, theta: float, rotary_dim: int | None, max_positions: Any) -> RopeSpec:
    """YaRN (Peng et al., 2023). Scores are sharpened by `attention_factor`, in DeepSeek's spelling a quotient."""
    factor = number(parameters, "factor")

    def sharpening(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    usual = sharpening(1.0)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        usual = sharpening(number(parameters, "mscale")) / sharpening(number(parameters, "mscale_all_dim"))
    if theta <= 1:
        raise CheckpointError(f"config.json: rope scaling yarn needs a rope_theta of more than 1, got {theta:g}")
    return RopeSpec(
        theta,
        "yarn",
        factor,
        original_max_positions=positive(parameters, "original_max_position_embeddings", max_positions),
        beta_fast=number(parameters, "beta_fast", 32),
        beta_slow=number(parameters, "beta_slow", 1),
        attention_factor=number(parameters, "attention_factor", usual),
        truncate=flag(parameters, "truncate", True),
        rotary_dim=rotary_dim,
    )


def max_positions(config: Config, rope: RopeSpec | None, default: int) -> int:
    """How long a sequence may be: what yarn stretches counts at its new length."""
    said = positive(config, "max_position_embeddings", default)
    if rope is None or rope.kind != "yarn":
        return said
    return max(said, int(rope.factor * rope.original_max_positions))
