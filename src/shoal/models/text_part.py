"""Models that see images too, as models of text. Free of torch.

Their text part is a model of a family, whose config.json is inside theirs as `text_config`, with as little in it as
differs from the defaults of transformers. What else their files hold is not read.
"""

from collections.abc import Mapping
from typing import Any

from shoal.errors import CheckpointError

_TEXTS = {"gemma3_text": "Gemma3ForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# Architecture -> model_type of its text where that is not named, and whether its head is tied where that is not.
_WHOLES = {
    "Gemma3ForConditionalGeneration": ("gemma3_text", True),
    "LlavaForConditionalGeneration": ("llama", False),
    "Mistral3ForConditionalGeneration": ("mistral", True),
}
_SIZES: dict[str, dict[str, int]] = {
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
_OF_ALL = ("quantization_config", "dtype", "torch_dtype", "eos_token_id")  # what the whole says for its text too
# What stands before a text's tensors in files of the whole, by old and by new versions of transformers.
PREFIXES = ("language_model.model.", "model.language_model.")


def whole_of(config: Mapping[str, Any]) -> str | None:
    """The architecture that sees images too, if we serve the text of it."""
    named = config.get("architectures")
    return next((name for name in _WHOLES if name in named), None) if isinstance(named, list) else None


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text alone; what is a text already, or not known, stays as it is.

    Raises:
        CheckpointError: `text_config` is no object.
    """
    whole = whole_of(config)
    if whole is None:
        return dict(config)
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise CheckpointError(f"config.json: text_config must be an object, got {text!r}")
    usual, tied = _WHOLES[whole]
    kind = str(text.get("model_type") or usual)
    if kind not in _TEXTS:
        return dict(config)
    above = {key: config[key] for key in _OF_ALL if config.get(key) is not None}
    ties = config.get("tie_word_embeddings")
    if ties is None:
        ties = tied or bool(text.get("tie_word_embeddings"))
    named = {"architectures": [_TEXTS[kind]], "model_type": kind, "tie_word_embeddings": ties}
    return {**_SIZES[kind], **text, **above, **named}
