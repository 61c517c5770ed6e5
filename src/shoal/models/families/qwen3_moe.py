"""Qwen3 MoE: mixtures of experts without a shared one, and norms on query and key heads."""

import dataclasses

from shoal.models.config_json.fields import flag, positive_int, sliding_window
from shoal.models.families import llama, qwen2_moe
from shoal.models.spec import Config, ModelFamily, ModelSpec


def read(config: Config) -> ModelSpec:
    positions = positive_int(config, "max_position_embeddings", 32768)
    spec = llama.read({"num_key_value_heads": 4, **config, "mlp_bias": False, "max_position_embeddings": positions})
    (full,) = spec.attention
    length = sliding_window(config, 4096) if flag(config, "use_sliding_window", False) else None
    return dataclasses.replace(
        spec,
        family="qwen3_moe",
        attention=(dataclasses.replace(full, window=length),),
        qk_norm=spec.norm,
        moe=qwen2_moe.mixture(config, spec.num_layers, experts=128, top_k=8, size=768),
    )


FAMILY = ModelFamily(architectures=("Qwen3MoeForCausalLM",), model_type="qwen3_moe", read=read)
