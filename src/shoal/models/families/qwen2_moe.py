"""Qwen 1.5 MoE and 2 MoE: mixtures of many small experts, and a shared expert with a gate."""

import dataclasses

from shoal.errors import CheckpointError
from shoal.models.config_json.fields import flag, non_negative_int, positive_int, sliding_layers, sliding_window
from shoal.models.families import llama
from shoal.models.spec import AttentionSpec, Config, ModelFamily, ModelSpec, MoESpec, RoutingSpec


def read(config: Config) -> ModelSpec:
    positions = positive_int(config, "max_position_embeddings", 32768)
    spec = llama.read({"num_key_value_heads": 16, **config, "mlp_bias": False, "max_position_embeddings": positions})
    moe = dataclasses.replace(
        mixture(config, spec.num_layers, experts=60, top_k=4, size=1408),
        shared_size=positive_int(config, "shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    return dataclasses.replace(
        spec,
        family="qwen2_moe",
        attention=_attention(config, spec),
        qkv_bias=flag(config, "qkv_bias", True),
        out_bias=False,
        moe=moe,
    )


def mixture(config: Config, layers: int, *, experts: int, top_k: int, size: int) -> MoESpec:
    """Return the mixture without its shared expert. The arguments are the family's defaults for missing fields."""
    return MoESpec(
        positive_int(config, "num_experts", config.get("num_local_experts") or experts),
        positive_int(config, "moe_intermediate_size", size),
        RoutingSpec(
            positive_int(config, "num_experts_per_tok", top_k), normalize=flag(config, "norm_topk_prob", False)
        ),
        _mixed_layers(config, layers),
    )


def _mixed_layers(config: Config, layers: int) -> tuple[bool, ...]:
    """Return for each layer whether it has experts: every `decoder_sparse_step`th, except `mlp_only_layers`."""
    step, dense = positive_int(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise CheckpointError(f"config.json: mlp_only_layers must be a list of layer numbers, got {dense!r}")
    return tuple((i + 1) % step == 0 and i not in dense for i in range(layers))


def _attention(config: Config, spec: ModelSpec) -> tuple[AttentionSpec, ...]:
    """Return the attention of each layer. If windows are used, every other of the first `max_window_layers` has one."""
    (full,) = spec.attention
    length = sliding_window(config, 4096) if flag(config, "use_sliding_window", False) else None
    below = non_negative_int(config, "max_window_layers", 28)
    default = [length is not None and i % 2 == 0 and i < below for i in range(spec.num_layers)]
    sliding = sliding_layers(config, default)
    return tuple(dataclasses.replace(full, window=length) if slides else full for slides in sliding)


FAMILY = ModelFamily(architectures=("Qwen2MoeForCausalLM",), model_type="qwen2_moe", read=read)
