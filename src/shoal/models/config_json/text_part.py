"""The text part of multimodal models, which read images too. Free of torch.

The text part is a model of one of our families. Its configuration is the `text_config` in config.json, which has only
the fields that differ from the defaults of transformers. The other parts of such a model are not read.
"""

from collections.abc import Mapping
from typing import Any

from shoal.errors import CheckpointError

_TEXT_ARCHITECTURES = {"gemma3_text": "Gemma3ForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# Architecture -> model_type of the text part if `text_config` names none, and whether the output head is tied to the
# embedding if config.json does not say.
_MULTIMODAL = {
    "Gemma3ForConditionalGeneration": ("gemma3_text", True),
    "LlavaForConditionalGeneration": ("llama", False),
    "Mistral3ForConditionalGeneration": ("mistral", True),
}
_DEFAULT_SIZES: dict[str, dict[str, int]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
# Fields beside `text_config` that count for the text part too.
_SHARED_FIELDS = ("quantization_config", "dtype", "torch_dtype", "eos_token_id")
# Prefixes of the names of the text part's tensors, in files of older and of newer versions of transformers.
PREFIXES = ("language_model.model.", "model.language_model.")


def multimodal_architecture(config: Mapping[str, Any]) -> str | None:
    """Return the architecture if it is a multimodal one whose text part is supported, else None."""
    named = config.get("architectures")
    return next((name for name in _MULTIMODAL if name in named), None) if isinstance(named, list) else None


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text part; that of any other model is returned unchanged.

    Raises:
        CheckpointError: `text_config` is not an object.
    """
    whole = multimodal_architecture(config)
    if whole is None:
        return dict(config)
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config must be an object, got {text!r}")
    usual, tied = _MULTIMODAL[whole]
    kind = str(text.get("model_type") or usual)
    if kind not in _TEXT_ARCHITECTURES:
        return dict(config)
    above = {key: config[key] for key in _SHARED_FIELDS if config.get(key) is not None}
    ties = config.get("tie_word_embeddings")
    if ties is None:
        ties = tied or bool(text.get("tie_word_embeddings"))
    named = {"architectures": [_TEXT_ARCHITECTURES[kind]], "model_type": kind, "tie_word_embeddings": ties}
    return {**_DEFAULT_SIZES[kind], **text, **above, **named}
