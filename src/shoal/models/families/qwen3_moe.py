"""Qwen3 with mixtures of experts: norms over query and key heads, no shared expert."""

import dataclasses

from shoal.models.families import llama, qwen2_moe
from shoal.models.fields import flag, positive, window
from shoal.models.spec import Config, ModelFamily, ModelSpec


def read(config: Config) -> ModelSpec:
    positions = positive(config, "max_position_embeddings", 32768)
    spec = llama.read({"num_key_value_heads": 4, **config, "mlp_bias": False, "max_position_embeddings": positions})
    (full,) = spec.attention
    length = window(config, 4096) if flag(config, "use_sliding_window", False) else None
    return dataclasses.replace(
        spec,
        family="qwen3_moe",
        attention=(dataclasses.replace(full, window=length),),
        qk_norm=spec.norm,
        moe=qwen2_moe.mixture(config, spec.num_layers, experts=128, top_k=8, size=768),
    )


FAMILY = ModelFamily(architectures=("Qwen3MoeForCausalLM",), model_type="qwen3_moe", read=read)
