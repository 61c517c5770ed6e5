"""DeepSeek V3 and R1: like V2, but a sigmoid scores each expert, and a bias that is not in the weights helps to choose.

The layers after the last one that predict further tokens (multi-token prediction) are not read.
"""

import dataclasses

from shoal.models.config_json.fields import flag, non_negative_int, positive_float, positive_int
from shoal.models.families import deepseek_v2
from shoal.models.spec import Config, ModelFamily, ModelSpec, MoESpec, RoutingSpec, Unsupported


def read(config: Config) -> ModelSpec:
    config = {**config, "max_position_embeddings": positive_int(config, "max_position_embeddings", 4096)}
    latent = deepseek_v2.read_latent(config, q_rank=1536)
    latent = dataclasses.replace(latent, interleaved=flag(config, "rope_interleave", True))
    spec = deepseek_v2.read_decoder(config, latent, mlp_bias=False)
    size = positive_int(config, "moe_intermediate_size", 2048)
    moe = MoESpec(
        num_experts=positive_int(config, "num_local_experts", positive_int(config, "n_routed_experts", 256)),
        intermediate_size=size,
        routing=_routing(config),
        layers=deepseek_v2.mixture_layers(config, spec.num_layers, 3),
        shared_size=size * non_negative_int(config, "n_shared_experts", 1),
    )
    return dataclasses.replace(spec, family="deepseek_v3", moe=moe)


def _routing(config: Config) -> RoutingSpec:
    for key, wanted in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if (config.get(key) or wanted) != wanted:
            raise Unsupported(
                f"config.json: {key} {config[key]!r} is not supported for deepseek_v3; supported is {wanted}"
            )
    return RoutingSpec(
        top_k=positive_int(config, "num_experts_per_tok", 8),
        scoring="sigmoid",
        normalize=flag(config, "norm_topk_prob", True),
        scale=positive_float(config, "routed_scaling_factor", 2.5),
        correction_bias=True,
        groups=positive_int(config, "n_group", 8),
        top_groups=positive_int(config, "topk_group", 4),
        group_score="best_two",
        wide=True,
    )


FAMILY = ModelFamily(
    architectures=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    read=read,
    names=deepseek_v2.NAMES,
    experts=deepseek_v2.FAMILY.experts,
)
