"""Reading fields of config.json: old and new spellings, and what transformers takes where one is missing.

A field that is null counts as missing, but where it says "none" of something (`optional`).
"""

import math
from collections.abc import Mapping, Sequence

from shoal.errors import CheckpointError
from shoal.models.spec import Activation, Config, Unsupported

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


def said_dtype(config: Config) -> str | None:
    """`dtype` (or `torch_dtype`), of the whole or of its `text_config`; None where config.json names none."""
    text = config.get("text_config")
    for each in (config, text if isinstance(text, Mapping) else {}):
        found = each.get("dtype") or each.get("torch_dtype")
        if found and found != "auto":
            return str(found).removeprefix("torch.")
    return None


def dtype_name(config: Config) -> str:
    """Where config.json names none, float32; what the weights say is for who has opened them."""
    return said_dtype(config) or "float32"


def layer_types(config: Config, default: Sequence[bool]) -> list[bool]:
    """Which layers have a sliding window.

    Raises:
        Unsupported: `layer_types` names another kind of attention.
        CheckpointError: it has not one name for each layer.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        return list(default)
    known = {"full_attention": False, "attention": False, "sliding_attention": True}
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise CheckpointError(f"config.json: layer_types must be a list of {len(default)} names, got {kinds!r}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise Unsupported(f"config.json: layer type {kind!r} is not supported; supported are {', '.join(known)}")
    return [known[kind] for kind in kinds]
