"""Qwen2 and 2.5: llama with biases on queries, keys and values, and a sliding window in some layers."""

import dataclasses

from shoal.models.families import llama
from shoal.models.fields import flag, layer_types, positive, whole, window
from shoal.models.spec import AttentionSpec, Config, ModelFamily, ModelSpec


def read(config: Config) -> ModelSpec:
    positions = positive(config, "max_position_embeddings", 32768)
    spec = llama.read({"num_key_value_heads": 32, **config, "mlp_bias": False, "max_position_embeddings": positions})
    return dataclasses.replace(spec, family="qwen2", attention=_attention(config, spec), qkv_bias=True, out_bias=False)


def _attention(config: Config, spec: ModelSpec) -> tuple[AttentionSpec, ...]:
    """A window in the layers from `max_window_layers` on, where it is used at all."""
    (full,) = spec.attention
    length = window(config, 4096) if flag(config, "use_sliding_window", False) else None
    first = whole(config, "max_window_layers", 28)
    sliding = layer_types(config, [length is not None and i >= first for i in range(spec.num_layers)])
    return tuple(dataclasses.replace(full, window=length) if slides else full for slides in sliding)


FAMILY = ModelFamily(architectures=("Qwen2ForCausalLM",), model_type="qwen2", read=read)
