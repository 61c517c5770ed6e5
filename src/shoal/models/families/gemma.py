"""Gemma: llama with norms of weight 1 + w, scaled embeddings and a tanh GELU."""

import dataclasses

from shoal.models.families import llama
from shoal.models.fields import activation, flag, number, positive
from shoal.models.spec import Config, ModelFamily, ModelSpec, NormSpec, Unsupported


def read(config: Config) -> ModelSpec:
    """What all generations share."""
    if config.get("use_bidirectional_attention"):
        raise Unsupported("config.json: use_bidirectional_attention is not supported: a token sees what is before it")
    fixed = {
        "head_dim": positive(config, "head_dim", 256),
        "max_position_embeddings": positive(config, "max_position_embeddings", 8192),
        "tie_word_embeddings": flag(config, "tie_word_embeddings", True),
        "mlp_bias": False,
        "hidden_act": None,  # read here
    }
    spec = llama.read({"num_key_value_heads": 16, **config, **fixed})
    # The first configurations say "gelu" and mean its approximation by a tanh. Later generations have another name.
    kind = activation(config, "gelu_pytorch_tanh", "hidden_act")
    return dataclasses.replace(
        spec,
        family="gemma",
        norm=NormSpec("rms_wide", number(config, "rms_norm_eps", 1e-6), one_plus=True),
        activation="gelu_tanh" if kind == "gelu" else kind,
        embedding_scale=spec.hidden_size**0.5,
    )


FAMILY = ModelFamily(architectures=("GemmaForCausalLM",), model_type="gemma", read=read)
