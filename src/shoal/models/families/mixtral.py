"""Mixtral: like Mistral, with a mixture of experts in every layer."""

import dataclasses

from shoal.models.config_json.fields import positive_float, positive_int, sliding_window
from shoal.models.families import llama
from shoal.models.spec import Config, ExpertNames, ModelFamily, ModelSpec, MoESpec, NormSpec, RoutingSpec, TensorNames


def read(config: Config) -> ModelSpec:
    fixed = {
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": positive_int(config, "max_position_embeddings", 131072),
        "num_key_value_heads": positive_int(config, "num_key_value_heads", 8),
        "rope_theta": positive_float(config, "rope_theta", 1e6),
    }
    spec = llama.read({**config, **fixed})
    (full,) = spec.attention
    moe = MoESpec(
        positive_int(config, "num_experts", positive_int(config, "num_local_experts", 8)),
        spec.intermediate_size,
        RoutingSpec(positive_int(config, "num_experts_per_tok", 2)),
        (True,) * spec.num_layers,
    )
    return dataclasses.replace(
        spec,
        family="mixtral",
        attention=(dataclasses.replace(full, window=sliding_window(config, None)),),
        norm=NormSpec("rms", positive_float(config, "rms_norm_eps", 1e-5)),
        moe=moe,
    )


_PUBLISHED = ExpertNames(
    router="block_sparse_moe.gate.weight",
    up=("block_sparse_moe.experts.{e}.w1.weight", "block_sparse_moe.experts.{e}.w3.weight"),
    down="block_sparse_moe.experts.{e}.w2.weight",
)
FAMILY = ModelFamily(
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    read=read,
    names=TensorNames(experts=_PUBLISHED),
    experts=(_PUBLISHED, ExpertNames().stacked()),
)
