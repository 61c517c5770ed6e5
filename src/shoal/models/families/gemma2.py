"""Gemma 2: like Gemma, with norms before and after each sublayer, soft caps, and a window in every other layer."""

import dataclasses

from shoal.models.config_json.fields import (
    activation,
    positive_float,
    positive_float_or_none,
    sliding_layers,
    sliding_window,
)
from shoal.models.families import gemma
from shoal.models.spec import Config, ModelFamily, ModelSpec, TensorNames


def read(config: Config) -> ModelSpec:
    spec = gemma.read({"num_key_value_heads": 4, **config, "hidden_act": None})
    (attention,) = spec.attention
    full = dataclasses.replace(
        attention,
        scale=positive_float(config, "query_pre_attn_scalar", 256) ** -0.5,
        softcap=positive_float_or_none(config, "attn_logit_softcapping", 50.0),
    )
    windowed = dataclasses.replace(full, window=sliding_window(config, 4096))
    sliding = sliding_layers(config, [i % 2 == 0 for i in range(spec.num_layers)])
    return dataclasses.replace(
        spec,
        family="gemma2",
        layout="sandwich",
        activation=activation(config, "gelu_pytorch_tanh", "hidden_activation"),
        attention=tuple(windowed if slides else full for slides in sliding),
        logit_softcap=positive_float_or_none(config, "final_logit_softcapping", 30.0),
    )


NAMES = TensorNames(mlp_norm="pre_feedforward_layernorm")
FAMILY = ModelFamily(architectures=("Gemma2ForCausalLM",), model_type="gemma2", read=read, names=NAMES)
