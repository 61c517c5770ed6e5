"""Mistral: llama with a sliding window in every layer."""

import dataclasses

from shoal.models.families import llama
from shoal.models.fields import positive, window
from shoal.models.spec import Config, Family, ModelSpec


def read(config: Config) -> ModelSpec:
    positions = positive(config, "max_position_embeddings", 131072)
    fixed = {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": positions}
    spec = llama.read({"num_key_value_heads": 8, **config, **fixed})
    (full,) = spec.attention
    windowed = dataclasses.replace(full, window=window(config, 4096))
    return dataclasses.replace(spec, family="mistral", attention=(windowed,))


FAMILY = Family(architectures=("MistralForCausalLM",), model_type="mistral", read=read)
