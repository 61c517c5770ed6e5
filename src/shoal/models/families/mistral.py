"""Mistral: llama with a sliding window in every layer, or in those that are named."""

import dataclasses

from shoal.models.families import llama
from shoal.models.fields import layer_types, positive, window
from shoal.models.spec import Config, ModelFamily, ModelSpec


def read(config: Config) -> ModelSpec:
    positions = positive(config, "max_position_embeddings", 131072)
    fixed = {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": positions}
    spec = llama.read({"num_key_value_heads": 8, **config, **fixed})
    (full,) = spec.attention
    windowed = dataclasses.replace(full, window=window(config, 4096))
    sliding = layer_types(config, [True] * spec.num_layers)
    attention = (windowed,) if all(sliding) else tuple(windowed if slides else full for slides in sliding)
    return dataclasses.replace(spec, family="mistral", attention=attention)


FAMILY = ModelFamily(architectures=("MistralForCausalLM",), model_type="mistral", read=read)
