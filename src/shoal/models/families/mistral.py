"""Mistral: like llama, with a sliding window in every layer or in those that `layer_types` names."""

import dataclasses

from shoal.models.config_json.fields import positive_int, sliding_layers, sliding_window
from shoal.models.families import llama
from shoal.models.spec import Config, ModelFamily, ModelSpec


def read(config: Config) -> ModelSpec:
    positions = positive_int(config, "max_position_embeddings", 131072)
    fixed = {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": positions}
    spec = llama.read({"num_key_value_heads": 8, **config, **fixed})
    (full,) = spec.attention
    windowed = dataclasses.replace(full, window=sliding_window(config, 4096))
    sliding = sliding_layers(config, [True] * spec.num_layers)
    attention = (windowed,) if all(sliding) else tuple(windowed if slides else full for slides in sliding)
    return dataclasses.replace(spec, family="mistral", attention=attention)


FAMILY = ModelFamily(architectures=("MistralForCausalLM",), model_type="mistral", read=read)
