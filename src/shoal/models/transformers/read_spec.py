"""Reads the spec of a model that no family reads, by trying transformers' module out. Free of torch itself.

The trial (`models.transformers.trial`) loads torch and transformers; it is loaded only for a model that needs it.
"""

from collections.abc import Mapping
from typing import Any

from shoal.lazy import load
from shoal.models.rope_fields import kind_of
from shoal.models.transformers.fallback_spec import FallbackSpec, refusal

# Kinds of rope whose angles depend on a token's position alone, and those for which this holds up to an original
# length. Others change with the longest sequence of a batch.
_STEADY_ROPES = ("default", "linear", "llama3", "yarn", "proportional")
_STEADY_WITHIN = ("dynamic", "longrope")
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")


def read_fallback_spec(config: Mapping[str, Any], where: str) -> FallbackSpec:
    """The spec of any causal model that transformers knows. Loads torch and transformers.

    Raises:
        CheckpointError: transformers is not installed or does not know the model, or the model needs what the engine
            does not have; it says what.
    """
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if architectures else ""
    if reason := _obstacle(config):
        raise refusal(where, architecture, reason)
    try:
        inspect = load("shoal.models.transformers.trial:inspect")
    except ImportError as error:
        raise refusal(where, architecture, f"{error}; install transformers") from None
    found: FallbackSpec = inspect(config, architecture, where)
    return found


def _obstacle(config: Mapping[str, Any]) -> str | None:
    """What config.json alone says against it."""
    if config.get("quantization_config"):
        return "its weights are quantized, which is not supported"
    nested = next((key for key in ("text_config", "vision_config", "audio_config") if config.get(key)), None)
    if nested:
        return f"it has a {nested}: models of more than text are not supported"
    if config.get("is_encoder_decoder"):
        return "it has an encoder, and only decoders are supported"
    kinds = {str(kind) for kind in config.get("layer_types") or ()} - set(_ATTENTION_LAYERS)
    if kinds:
        return f"its layers of type {', '.join(sorted(kinds))} need more than a KV cache"
    kind = _unsteady_rope(config)
    if kind is not None:
        return f"rope scaling {kind} changes with the longest sequence of a batch, so results would too"
    return None


def _unsteady_rope(config: Mapping[str, Any]) -> str | None:
    """The kind of a rope whose angles are not those of a position, however short a text is."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if not isinstance(found, Mapping):
            continue
        layers = [value for value in found.values() if isinstance(value, Mapping)] or [found]  # some by layer type
        for layer in layers:
            kind = "longrope" if kind_of(layer) == "su" else kind_of(layer)
            if kind not in _STEADY_ROPES and (layer is not found or kind not in _STEADY_WITHIN):
                return kind
    return None
