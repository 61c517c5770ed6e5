"""Reading the fields of config.json, in old and new spellings, with the default of transformers for a missing field.

A field that is null counts as missing, except for fields where null means that the model has no such thing.
"""

import math
from collections.abc import Mapping, Sequence

from shoal.errors import CheckpointError
from shoal.models.spec import Activation, Config, Unsupported
from shoal.values import shown

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


_MAX_LAYERS = 10_000


def positive_int(config: Config, key: str, default: int | None = None) -> int:
    """Return a field that must be a positive integer, such as a size.

    Raises:
        CheckpointError: the field is missing without a default, not an integer, or not positive.
    """
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def layer_count(config: Config, default: int | None = None, *, key: str = "num_hidden_layers") -> int:
    """Return the number of layers, which is bounded because readers make a list with an entry for each layer.

    Raises:
        CheckpointError: the field is missing without a default, not a positive integer, or too large.
    """
    value = positive_int(config, key, default)
    if value > _MAX_LAYERS:
        raise CheckpointError(f"config.json: {key} must be at most {_MAX_LAYERS}, got {shown(value)}")
    return value


def non_negative_int(config: Config, key: str, default: int) -> int:
    """Return a field that must be an integer of at least 0, such as a count.

    Raises:
        CheckpointError: the field is not an integer, or negative.
    """
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CheckpointError(f"config.json: {key} must be an integer of at least 0, got {value!r}")
    return value


def positive_float(config: Config, key: str, default: float | None = None) -> float:
    """Return a field that must be a positive, finite number.

    Raises:
        CheckpointError: the field is missing without a default, not a number, not positive, or not finite.
    """
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} must be a positive number, got {value!r}")
    return float(value)


def positive_float_or_none(config: Config, key: str, default: float | None) -> float | None:
    """Return a field that must be a positive number, or None if it is null. `default` stands for a missing field.

    Raises:
        CheckpointError: the field is anything else.
    """
    value = config.get(key, default)
    return None if value is None else positive_float(config, key, value)


def sliding_window(config: Config, default: int | None) -> int | None:
    """Return the length of the sliding window in tokens, or None if `sliding_window` is null.

    `default` stands for a missing field.
    """
    return None if config.get("sliding_window", default) is None else positive_int(config, "sliding_window", default)


def divided_head_dim(hidden: int, heads: int) -> int:
    """Return the size of each head if the heads divide the hidden size.

    Raises:
        CheckpointError: the hidden size is not a multiple of the number of heads.
    """
    if hidden % heads:
        raise CheckpointError(f"config.json: hidden size {hidden} is not a multiple of {heads} attention heads")
    return hidden // heads


def flag(config: Config, key: str, default: bool) -> bool:
    value = config.get(key)
    return default if value is None else bool(value)


def activation(config: Config, default: str, *keys: str) -> Activation:
    """Return the activation that the first of `keys` that is present names.

    Raises:
        Unsupported: the kernels do not have this activation.
    """
    name = next((config[key] for key in keys if config.get(key) is not None), default)
    if name not in _ACTIVATIONS:
        supported = ", ".join(_ACTIVATIONS)
        raise Unsupported(f"config.json: {keys[0]} {name!r} is not supported; supported are {supported}")
    return _ACTIVATIONS[name]


def named_dtype(config: Config) -> str | None:
    """Return the dtype that config.json or its `text_config` names (`dtype`, once `torch_dtype`), or None."""
    text = config.get("text_config")
    for each in (config, text if isinstance(text, Mapping) else {}):
        found = each.get("dtype") or each.get("torch_dtype")
        if found and found != "auto":
            return str(found).removeprefix("torch.")
    return None


def dtype_name(config: Config) -> str:
    """Return the dtype that config.json names, or "float32" as transformers does.

    `open_model` replaces this default by the dtype of the weights.
    """
    return named_dtype(config) or "float32"


def sliding_layers(config: Config, default: Sequence[bool]) -> list[bool]:
    """Return for each layer whether it has a sliding window, by `layer_types`, or `default` if that is missing.

    Raises:
        Unsupported: `layer_types` names another kind of attention.
        CheckpointError: `layer_types` is not a list with one name for each layer.
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
