"""Reading rotary positions (the rope) from config.json, and the length of texts that they allow. Free of torch.

Old files have `rope_theta` and `rope_scaling`. New files have `rope_parameters`, which may have one rope for each kind
of layer. If a file has both, or neither, the result is that of transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

from shoal.errors import CheckpointError
from shoal.models.config_json.fields import flag, positive_float, positive_int
from shoal.models.spec import Config, RopeSpec, Unsupported

_ORIGINAL = "original_max_position_embeddings"
_LENGTH = "max_position_embeddings"
_SCALED = ("linear", "llama3", "yarn", "dynamic", "longrope")


def rope_parameters(config: Config) -> dict[str, Any]:
    """Return `rope_scaling` if it is not empty, else `rope_parameters`, as transformers does."""
    return dict(config.get("rope_scaling") or config.get("rope_parameters") or {})


def rope_kind(parameters: Mapping[str, Any]) -> str:
    """Return the kind of scaling: `rope_type`, which the first files call `type`, or "default"."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def read_rope(
    config: Config,
    head_dim: int,
    *,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
    rotated_share: float | None = None,
    share_key: str = "partial_rotary_factor",
    layer_type: str = "full_attention",
) -> RopeSpec:
    """Return the rope of one type of layers.

    Args:
        theta: the family's base if config.json has none.
        theta_key: the name of the base in config.json.
        rotated_share: the share of each head that the family rotates if config.json does not say. None: the family
            rotates whole heads and ignores `share_key`, unless the rope is scaled (as transformers does).
        share_key: the name of that share in config.json.

    Raises:
        Unsupported: `RopeSpec` has no such kind of scaling.
        CheckpointError: a value is malformed.
    """
    outer = rope_parameters(config)
    nested = layer_type in outer
    parameters = dict(outer[layer_type] or {}) if nested else outer
    if not nested and config.get(_ORIGINAL) is not None:
        parameters |= {_ORIGINAL: config[_ORIGINAL]}
    if nested:
        parameters |= {"truncate": outer.get("truncate")}
    base = positive_float(parameters, "rope_theta", positive_float(config, theta_key, theta))
    kind = rope_kind(parameters)
    if rotated_share is None and kind == "default":
        return RopeSpec(base)
    share = positive_float(parameters, "partial_rotary_factor", positive_float(config, share_key, rotated_share or 1.0))
    return _scaled(kind, parameters, base, _rotary_dim(head_dim, share), head_dim, config.get(_LENGTH))


def _rotary_dim(head_dim: int, share: float) -> int | None:
    """Return how many dimensions of a head are rotated, or None for the whole head."""
    dim = int(head_dim * share)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise CheckpointError(
            f"config.json: {dim} of the {head_dim} dimensions of a head are rotated, but it must be an even number"
        )
    return None if dim == head_dim else dim


def _scaled(
    kind: str, parameters: Config, theta: float, rotary_dim: int | None, head_dim: int, positions: Any
) -> RopeSpec:
    """Return a rope with this kind of scaling.

    `positions` is max_position_embeddings, which is the original length if no other is given.
    """
    if kind == "default":
        return RopeSpec(theta, rotary_dim=rotary_dim)
    if kind == "linear":
        original = 0 if parameters.get(_ORIGINAL) is None else positive_int(parameters, _ORIGINAL)
        factor = positive_float(parameters, "factor")
        return RopeSpec(theta, "linear", factor, original_max_positions=original, rotary_dim=rotary_dim)
    if kind == "dynamic":  # up to this length it does not scale, and longer texts are not allowed
        positive_float(parameters, "factor")
        return RopeSpec(theta, rotary_dim=rotary_dim, steady_positions=positive_int({_LENGTH: positions}, _LENGTH))
    if kind == "llama3":
        return _llama3(parameters, theta, rotary_dim, positions)
    if kind == "yarn":
        return _yarn(parameters, theta, rotary_dim, positions)
    if kind == "longrope":
        return _longrope(parameters, theta, rotary_dim, head_dim, positions)
    raise _unknown(repr(kind))


def _unknown(what: str) -> Unsupported:
    return Unsupported(
        f"config.json: rope scaling {what} is not supported; supported are default, {', '.join(_SCALED)}"
    )


def _llama3(parameters: Config, theta: float, rotary_dim: int | None, positions: Any) -> RopeSpec:
    low, high = positive_float(parameters, "low_freq_factor"), positive_float(parameters, "high_freq_factor")
    if low >= high:
        raise CheckpointError(f"config.json: low_freq_factor {low:g} must be less than high_freq_factor {high:g}")
    original = positive_int(parameters, _ORIGINAL, positions)
    return RopeSpec(theta, "llama3", positive_float(parameters, "factor"), low, high, original, rotary_dim=rotary_dim)


def _yarn(parameters: Config, theta: float, rotary_dim: int | None, positions: Any) -> RopeSpec:
    """Return a rope with YaRN scaling (Peng et al., 2023).

    The attention factor may be given as a quotient, as DeepSeek does (`mscale`, `mscale_all_dim`). A `factor` of null
    means the ratio of the new to the original length.
    """
    original = positive_int(parameters, _ORIGINAL, positions)
    grown = positive_int({_LENGTH: positions}, _LENGTH) / original if "factor" in parameters else None
    factor = positive_float(parameters, "factor", grown)

    def attention_factor(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    default = attention_factor(1.0)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        default = attention_factor(positive_float(parameters, "mscale"))
        default /= attention_factor(positive_float(parameters, "mscale_all_dim"))
    if theta <= 1:
        raise CheckpointError(f"config.json: rope scaling yarn needs a rope_theta of more than 1, got {theta:g}")
    return RopeSpec(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        beta_fast=positive_float(parameters, "beta_fast", 32),
        beta_slow=positive_float(parameters, "beta_slow", 1),
        attention_factor=positive_float(parameters, "attention_factor", default),
        truncate=flag(parameters, "truncate", True),
        rotary_dim=rotary_dim,
    )


def _longrope(parameters: Config, theta: float, rotary_dim: int | None, head_dim: int, positions: Any) -> RopeSpec:
    """Return a rope with LongRoPE scaling (Ding et al., 2024).

    Each pair of dimensions has a factor. Texts beyond the original length need other factors for all their tokens, so
    they are not allowed.
    """
    original = positive_int(parameters, _ORIGINAL, positions)
    factor = positive_float(parameters, "factor", positive_int({_LENGTH: positions}, _LENGTH, original) / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    factors, wanted = parameters.get("short_factor"), (rotary_dim or head_dim) // 2
    if not isinstance(factors, list) or len(factors) != wanted:
        raise _unknown(f"'longrope' without a short_factor of {wanted} numbers")
    return RopeSpec(
        theta,
        "longrope",
        attention_factor=positive_float(parameters, "attention_factor", default),
        rotary_dim=rotary_dim,
        short_factors=tuple(positive_float({"short_factor": each}, "short_factor") for each in factors),
        steady_positions=original,
    )


def max_positions(config: Config, rope: RopeSpec) -> int:
    """Return the number of positions that the model supports: `max_position_embeddings`, increased by scaling."""
    named = positive_int(config, _LENGTH)
    return stretched_positions(rope.kind, rope.factor, rope.original_max_positions or named, named)


def stretched_positions(kind: str, factor: float, original: int, named: int) -> int:
    """Return the number of positions after scaling. `named` is max_position_embeddings.

    The max_position_embeddings of a Llama 3 file is already the length after scaling if it is more than the original.
    """
    if kind == "llama3" and named > original:
        return named
    return max(named, int(factor * original)) if kind in ("linear", "yarn", "llama3") else named
