"""Small models that no family of ours reads, by transformers' names. A comment says what each one is for."""

from pathlib import Path
from typing import Any

from support.checkpoints import SIZES, save_model

_THREE = ["sliding_attention", "full_attention", "sliding_attention"]

# Models without a tensor-parallel plan.
ALONE: dict[str, dict[str, Any]] = {
    "StableLm": {"use_qkv_bias": True},  # a quarter of each head is rotated; it hands its attention nothing on
    "HunYuanDenseV1": {"head_dim": 8},  # norms of queries and keys after the rotation
    "GPTBigCode": {"multi_query": True},  # learned positions, one KV head
}
# Models with a plan that cuts attention and MLP.
CUT: dict[str, dict[str, Any]] = {
    "Granite": {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "Cohere2": {"sliding_window": 8, "layer_types": _THREE, "logit_scale": 2.0},  # parallel, turns without halves
    "Starcoder2": {"sliding_window": 8},  # biases everywhere
    "Exaone4": {"sliding_window": 8, "layer_types": _THREE},  # norms behind, no positions in layers without window
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "VaultGemma": {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 5.0},  # soft caps, scaled embedding
    "Apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},  # parameters that are one number
    "Glm": {"head_dim": 8, "partial_rotary_factor": 0.5},  # its plan gathers in the MLP: that stays whole
}
# Models with a plan that cuts only the MLP.
WHOLE_ATTENTION: dict[str, dict[str, Any]] = {
    "Olmo2": {},  # a norm over all query heads together
    "Cohere": {"use_qk_norm": True, "logit_scale": 2.0},  # norms with a weight a head
}
ALL = ALONE | CUT | WHOLE_ATTENTION


def make(name: str, **changes: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**SIZES, **ALL.get(name, {}), **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def save(name: str, folder: Path, **changes: Any) -> Path:
    """Write a checkpoint of the model `name`, the same at every call."""
    return save_model(lambda: make(name, **changes), folder)
