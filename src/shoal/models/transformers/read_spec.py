"""Reading the spec of a model that no family reads, through a trial of transformers' module. Free of torch itself.

The trial (`models.transformers.trial`) loads torch and transformers, so it is loaded only for a model that needs it.
"""

from collections.abc import Mapping
from typing import Any

from shoal.lazy import load
from shoal.models.config_json.rope_fields import rope_kind
from shoal.models.transformers.fallback_spec import FallbackSpec, refusal

# Kinds of rope whose angles depend only on a token's position, and those for which this is true up to the original
# length. The angles of all other kinds change with the longest sequence of a batch.
_FIXED_ROPES = ("default", "linear", "llama3", "yarn", "proportional")
_FIXED_ROPES_WITHIN_LENGTH = ("dynamic", "longrope")
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")


def read_fallback_spec(config: Mapping[str, Any], where: str) -> FallbackSpec:
    """Return the spec of any causal model that transformers knows. Loads torch and transformers.

    Args:
        config: the model's config.json.
        where: the model's folder, for error messages.

    Raises:
        CheckpointError: transformers is not installed or does not know the model, or the engine can't run the model;
            the message says why.
    """
    architectures = config.get("architectures")
    architecture = str(architectures[0]) if architectures else ""
    if reason := _reason_against(config):
        raise refusal(where, architecture, reason)
    try:
        inspect = load("shoal.models.transformers.trial:inspect")
    except ImportError as error:
        raise refusal(where, architecture, f"{error}; install transformers") from None
    found: FallbackSpec = inspect(config, architecture, where)
    return found


def _reason_against(config: Mapping[str, Any]) -> str | None:
    """Return why the model can't run, as far as config.json alone shows it, or None."""
    if config.get("quantization_config"):
        return "its weights are quantized, which is not supported"
    nested = next((key for key in ("text_config", "vision_config", "audio_config") if config.get(key)), None)
    if nested:
        return f"it has a {nested}: multimodal models are not supported"
    if config.get("is_encoder_decoder"):
        return "it has an encoder, but only decoders are supported"
    kinds = {str(kind) for kind in config.get("layer_types") or ()} - set(_ATTENTION_LAYERS)
    if kinds:
        return f"its layers of type {', '.join(sorted(kinds))} need more than a KV cache"
    kind = _changing_rope(config)
    if kind is not None:
        return f"rope scaling {kind} depends on the longest sequence of a batch, so results would depend on it too"
    return None


def _changing_rope(config: Mapping[str, Any]) -> str | None:
    """Return the kind of a rope whose angles depend on more than the position even in short texts, or None."""
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if not isinstance(found, Mapping):
            continue
        # `found` is one rope, or has one rope for each type of layers.
        layers = [value for value in found.values() if isinstance(value, Mapping)] or [found]
        for layer in layers:
            kind = "longrope" if rope_kind(layer) == "su" else rope_kind(layer)
            if kind not in _FIXED_ROPES and (layer is not found or kind not in _FIXED_ROPES_WITHIN_LENGTH):
                return kind
    return None
