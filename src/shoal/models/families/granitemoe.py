"""Granite with a mixture of experts in every layer, and PowerMoE: llama with factors at four places."""

import dataclasses

from shoal.models.families import llama
from shoal.models.fields import number, positive
from shoal.models.spec import Config, ExpertNames, ModelFamily, ModelSpec, MoESpec, RoutingSpec, TensorNames


def read(config: Config) -> ModelSpec:
    spec = llama.read({**config, "mlp_bias": False})
    (attention,) = spec.attention
    # The published model takes the softmax over the chosen logits alone, which is the one over all, made to sum to 1.
    moe = MoESpec(
        positive(config, "num_local_experts", 8),
        spec.intermediate_size,
        RoutingSpec(positive(config, "num_experts_per_tok", 2)),
        (True,) * spec.num_layers,
    )
    return dataclasses.replace(
        spec,
        family="granitemoe",
        attention=(dataclasses.replace(attention, scale=number(config, "attention_multiplier", 1.0)),),
        embedding_scale=number(config, "embedding_multiplier", 1.0),
        residual_scale=number(config, "residual_multiplier", 1.0),
        logit_scale=1 / number(config, "logits_scaling", 1.0),
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
