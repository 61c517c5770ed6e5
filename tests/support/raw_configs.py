"""Small random checkpoints with a config.json as people write it, with unused fields."""

import copy
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shoal.models.registry import FAMILIES
from support.checkpoints import SIZES, save_model

_MIXTURE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 26}
_LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}
# What a family needs beside SIZES to be small.
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "n_group": 4, "topk_group": 2},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3": {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 3, "num_hidden_layers": 6},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 256},
    "granitemoe": {"num_local_experts": 6, "intermediate_size": 44},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 37},
    "opt": {"ffn_dim": 112, "init_std": 0.3},
    "qwen2_moe": {**_MIXTURE, "shared_expert_intermediate_size": 50},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**_MIXTURE, "head_dim": 16},
}
_NOT_GPT2 = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "intermediate_size")


def raw_config(family: str, changes: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    found = FAMILIES[family]
    left_out = {*without, *(_NOT_GPT2 if family == "gpt2" else ())}
    sizes = {key: value for key, value in SIZES.items() if key not in left_out}
    named = {"architectures": list(found.architectures), "model_type": found.model_type}
    return copy.deepcopy({**named, **sizes, **_OWN.get(family, {}), **changes})


def save_raw(family: str, changes: Mapping[str, Any], folder: Path, without: Collection[str] = ()) -> Path:
    """Write a checkpoint with weights for this config.json, which is kept unchanged."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = raw_config(family, changes, without)
    read = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    save_model(lambda: AutoModelForCausalLM.from_config(read), folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
