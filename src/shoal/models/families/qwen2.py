"""Qwen2 and 2.5: like llama, with biases for queries, keys and values, and a sliding window in some layers."""

import dataclasses

from shoal.models.config_json.fields import flag, non_negative_int, positive_int, sliding_layers, sliding_window
from shoal.models.families import llama
from shoal.models.spec import AttentionSpec, Config, ModelFamily, ModelSpec


def read(config: Config) -> ModelSpec:
    positions = positive_int(config, "max_position_embeddings", 32768)
    spec = llama.read({"num_key_value_heads": 32, **config, "mlp_bias": False, "max_position_embeddings": positions})
    return dataclasses.replace(spec, family="qwen2", attention=_attention(config, spec), qkv_bias=True, out_bias=False)


def _attention(config: Config, spec: ModelSpec) -> tuple[AttentionSpec, ...]:
    """Return the attention of each layer. If windows are used, layers from `max_window_layers` on have one."""
    (full,) = spec.attention
    length = sliding_window(config, 4096) if flag(config, "use_sliding_window", False) else None
    first = non_negative_int(config, "max_window_layers", 28)
    sliding = sliding_layers(config, [length is not None and i >= first for i in range(spec.num_layers)])
    return tuple(dataclasses.replace(full, window=length) if slides else full for slides in sliding)


FAMILY = ModelFamily(architectures=("Qwen2ForCausalLM",), model_type="qwen2", read=read)
