"""Granite MoE and PowerMoE: like llama with a mixture of experts in every layer, and scaled by four factors."""

import dataclasses

from shoal.models.config_json.fields import positive_float, positive_int
from shoal.models.families import llama
from shoal.models.spec import Config, ExpertNames, ModelFamily, ModelSpec, MoESpec, RoutingSpec, TensorNames


def read(config: Config) -> ModelSpec:
    spec = llama.read({**config, "mlp_bias": False})
    (attention,) = spec.attention
    # The published code computes the softmax over the chosen logits only. This is the softmax over all, normalized.
    moe = MoESpec(
        positive_int(config, "num_local_experts", 8),
        spec.intermediate_size,
        RoutingSpec(positive_int(config, "num_experts_per_tok", 2)),
        (True,) * spec.num_layers,
    )
    return dataclasses.replace(
        spec,
        family="granitemoe",
        attention=(dataclasses.replace(attention, scale=positive_float(config, "attention_multiplier", 1.0)),),
        embedding_scale=positive_float(config, "embedding_multiplier", 1.0),
        residual_scale=positive_float(config, "residual_multiplier", 1.0),
        logit_scale=1 / positive_float(config, "logits_scaling", 1.0),
        moe=moe,
    )


_PUBLISHED = ExpertNames(
    router="block_sparse_moe.router.layer.weight",
    up=("block_sparse_moe.input_linear.weight",),
    down="block_sparse_moe.output_linear.weight",
)
_IN_MEMORY = ExpertNames(
    router="block_sparse_moe.router.weight",
    up=("block_sparse_moe.experts.gate_up_proj",),
    down="block_sparse_moe.experts.down_proj",
)
FAMILY = ModelFamily(
    architectures=("GraniteMoeForCausalLM",),
    model_type="granitemoe",
    read=read,
    names=TensorNames(experts=_PUBLISHED),
    experts=(_PUBLISHED, _IN_MEMORY),
)
