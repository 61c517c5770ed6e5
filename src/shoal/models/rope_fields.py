"""Reading what config.json says of rotary positions, and of how long a text they let be. Free of torch.

Old files have `rope_theta` and `rope_scaling`, new ones `rope_parameters`, which may say something else for each kind
of layer. What transformers takes where both are there, or neither, is taken here.
"""

import math
from collections.abc import Mapping
from typing import Any

from shoal.errors import CheckpointError
from shoal.models.fields import flag, number, positive
from shoal.models.spec import Config, RopeSpec, Unsupported

_ORIGINAL = "original_max_position_embeddings"
_LENGTH = "max_position_embeddings"
_SCALED = ("linear", "llama3", "yarn", "dynamic", "longrope")


def parameters_of(config: Config) -> dict[str, Any]:
    """A `rope_scaling` that says anything stands for all of `rope_parameters`, as in transformers."""
    return dict(config.get("rope_scaling") or config.get("rope_parameters") or {})


def kind_of(parameters: Mapping[str, Any]) -> str:
    """`rope_type`, or `type` in the first files."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def rope(
    config: Config,
    head_dim: int,
    *,
    theta: float = 10000.0,
    theta_key: str = "rope_theta",
    partial: float | None = None,
    partial_key: str = "partial_rotary_factor",
    layer_type: str = "full_attention",
) -> RopeSpec:
    """The rope of a layer type. `theta` and `partial` are what the family takes where nothing is said. A family without
    `partial` rotates whole heads, whatever `partial_key` says, unless the rope is scaled (which transformers tries).

    Raises:
        Unsupported: a kind of scaling that is none of RopeSpec's.
        CheckpointError: a value that makes no sense.
    """
    outer = parameters_of(config)
    nested = layer_type in outer
    parameters = dict(outer[layer_type] or {}) if nested else outer
    if not nested and config.get(_ORIGINAL) is not None:
        parameters |= {_ORIGINAL: config[_ORIGINAL]}
    if nested:
        parameters |= {"truncate": outer.get("truncate")}
    base = number(parameters, "rope_theta", number(config, theta_key, theta))
    kind = kind_of(parameters)
    if partial is None and kind == "default":
        return RopeSpec(base)
    share = number(parameters, "partial_rotary_factor", number(config, partial_key, partial or 1.0))
    return _scaled(kind, parameters, base, _rotary_dim(head_dim, share), head_dim, config.get(_LENGTH))


def _rotary_dim(head_dim: int, share: float) -> int | None:
    """None: the whole head."""
    dim = int(head_dim * share)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise CheckpointError(
            f"config.json: {dim} of a head's {head_dim} dimensions are rotated; it must be an even number of them"
        )
    return None if dim == head_dim else dim


def _scaled(
    kind: str, parameters: Config, theta: float, rotary_dim: int | None, head_dim: int, positions: Any
) -> RopeSpec:
    """`positions`: max_position_embeddings, which is the original length where no other is named."""
    if kind == "default":
        return RopeSpec(theta, rotary_dim=rotary_dim)
    if kind == "linear":
        original = 0 if parameters.get(_ORIGINAL) is None else positive(parameters, _ORIGINAL)
        factor = number(parameters, "factor")
        return RopeSpec(theta, "linear", factor, original_max_positions=original, rotary_dim=rotary_dim)
    if kind == "dynamic":  # up to this length it is no scaling at all
        number(parameters, "factor")
        return RopeSpec(theta, rotary_dim=rotary_dim, steady_positions=positive({_LENGTH: positions}, _LENGTH))
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
    low, high = number(parameters, "low_freq_factor"), number(parameters, "high_freq_factor")
    if low >= high:
        raise CheckpointError(f"config.json: low_freq_factor {low:g} must be less than high_freq_factor {high:g}")
    original = positive(parameters, _ORIGINAL, positions)
    return RopeSpec(theta, "llama3", number(parameters, "factor"), low, high, original, rotary_dim=rotary_dim)


def _yarn(parameters: Config, theta: float, rotary_dim: int | None, positions: Any) -> RopeSpec:
    """YaRN (Peng et al., 2023). Scores are sharpened by `attention_factor`, in DeepSeek's spelling a quotient. A factor
    that is null is that by which the length has grown."""
    original = positive(parameters, _ORIGINAL, positions)
    grown = positive({_LENGTH: positions}, _LENGTH) / original if "factor" in parameters else None
    factor = number(parameters, "factor", grown)

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
        original_max_positions=original,
        beta_fast=number(parameters, "beta_fast", 32),
        beta_slow=number(parameters, "beta_slow", 1),
        attention_factor=number(parameters, "attention_factor", usual),
        truncate=flag(parameters, "truncate", True),
        rotary_dim=rotary_dim,
    )


def _longrope(parameters: Config, theta: float, rotary_dim: int | None, head_dim: int, positions: Any) -> RopeSpec:
    """LongRoPE (Ding et al., 2024): within the original context each pair of dimensions has a factor of its own. Longer
    texts have other ones, for all of their tokens."""
    original = positive(parameters, _ORIGINAL, positions)
    factor = number(parameters, "factor", positive({_LENGTH: positions}, _LENGTH, original) / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    factors, wanted = parameters.get("short_factor"), (rotary_dim or head_dim) // 2
    if not isinstance(factors, list) or len(factors) != wanted:
        raise _unknown(f"'longrope' without a short_factor of {wanted} numbers")
    return RopeSpec(
        theta,
        "longrope",
        attention_factor=number(parameters, "attention_factor", usual),
        rotary_dim=rotary_dim,
        short_factors=tuple(number({"short_factor": each}, "short_factor") for each in factors),
        steady_positions=original,
    )


def max_positions(config: Config, rope: RopeSpec) -> int:
    """How long a text may be: `max_position_embeddings`, or what scaling makes of it."""
    said = positive(config, _LENGTH)
    return stretched(rope.kind, rope.factor, rope.original_max_positions or said, said)


def stretched(kind: str, factor: float, original: int, said: int) -> int:
    """What a scaling by `factor` makes of max_position_embeddings. That of Llama 3's files is the new length already,
    where it is more than the original one."""
    if kind == "llama3" and said > original:
        return said
    return max(said, int(factor * original)) if kind in ("linear", "yarn", "llama3") else said
