"""Gemma: like llama, but the weights of norms are 1 + w, embeddings are scaled, and the activation is a tanh GELU."""

import dataclasses

from shoal.models.config_json.fields import activation, flag, positive_float, positive_int
from shoal.models.families import llama
from shoal.models.spec import Config, ModelFamily, ModelSpec, NormSpec, Unsupported


def read(config: Config) -> ModelSpec:
    """Read the features that all generations of Gemma share."""
    if config.get("use_bidirectional_attention"):
        raise Unsupported("config.json: use_bidirectional_attention is not supported, only causal attention is")
    fixed = {
        "head_dim": positive_int(config, "head_dim", 256),
        "max_position_embeddings": positive_int(config, "max_position_embeddings", 8192),
        "tie_word_embeddings": flag(config, "tie_word_embeddings", True),
        "mlp_bias": False,
        "hidden_act": None,  # it is read below
    }
    spec = llama.read({"num_key_value_heads": 16, **config, **fixed})
    # The first configurations say "gelu" but mean its tanh approximation. Later generations have another field.
    kind = activation(config, "gelu_pytorch_tanh", "hidden_act")
    return dataclasses.replace(
        spec,
        family="gemma",
        norm=NormSpec("rms_wide", positive_float(config, "rms_norm_eps", 1e-6), one_plus=True),
        activation="gelu_tanh" if kind == "gelu" else kind,
        embedding_scale=spec.hidden_size**0.5,
    )


FAMILY = ModelFamily(architectures=("GemmaForCausalLM",), model_type="gemma", read=read)
