"""DeepSeek V2: latent attention; a few layers with an MLP, then layers with routed and shared experts."""

import dataclasses
import math

from shoal.models.config_json.fields import (
    activation,
    dtype_name,
    flag,
    layer_count,
    non_negative_int,
    positive_float,
    positive_int,
)
from shoal.models.config_json.rope_fields import max_positions, read_rope, rope_kind, rope_parameters
from shoal.models.spec import (
    AttentionSpec,
    Config,
    ExpertNames,
    LatentSpec,
    ModelFamily,
    ModelSpec,
    MoESpec,
    NormSpec,
    RoutingSpec,
    TensorNames,
    Unsupported,
)

_NORM_EPS = 1e-6  # for the norms inside attention; the `rms_norm_eps` of config.json is for all others


def read(config: Config) -> ModelSpec:
    config = {**config, "max_position_embeddings": positive_int(config, "max_position_embeddings", 2048)}
    latent = read_latent(config, q_rank=1536)
    spec = read_decoder(config, latent, mlp_bias=flag(config, "mlp_bias", False))
    return dataclasses.replace(spec, family="deepseek_v2", moe=_experts(config, spec.num_layers))


def read_latent(config: Config, q_rank: int) -> LatentSpec:
    """Return the latent attention. `q_rank` stands for a missing `q_lora_rank`; null means that queries have none."""
    rope_dim = positive_int(config, "qk_rope_head_dim", 64)
    rotary = read_rope(config, rope_dim)
    return LatentSpec(
        q_rank=None if config.get("q_lora_rank", q_rank) is None else positive_int(config, "q_lora_rank", q_rank),
        kv_rank=positive_int(config, "kv_lora_rank", 512),
        nope_dim=positive_int(config, "qk_nope_head_dim", 128),
        rope_dim=rope_dim,
        value_dim=positive_int(config, "v_head_dim", 128),
        rope=dataclasses.replace(rotary, rotary_dim=rope_dim),
        norm=NormSpec("rms", _NORM_EPS),
        interleaved=True,
    )


def read_decoder(config: Config, latent: LatentSpec, *, mlp_bias: bool) -> ModelSpec:
    """Return the spec without family and experts, from a config that has `max_position_embeddings`."""
    bias = flag(config, "attention_bias", False)
    return ModelSpec(
        family="",
        hidden_size=positive_int(config, "hidden_size"),
        num_layers=layer_count(config),
        num_heads=positive_int(config, "num_attention_heads"),
        num_kv_heads=1,
        head_dim=latent.cached_dim,
        intermediate_size=positive_int(config, "intermediate_size"),
        vocab_size=positive_int(config, "vocab_size"),
        max_positions=max_positions(config, latent.rope),
        attention=(AttentionSpec(_scale(config, latent)),),
        norm=NormSpec("rms", positive_float(config, "rms_norm_eps", 1e-6)),
        tie_embeddings=flag(config, "tie_word_embeddings", False),
        dtype=dtype_name(config),
        activation=activation(config, "silu", "hidden_act"),
        qkv_bias=bias,
        out_bias=bias,
        up_bias=mlp_bias,
        down_bias=mlp_bias,
        latent=latent,
    )


def _scale(config: Config, latent: LatentSpec) -> float:
    """Return the scale of attention scores. With YaRN it grows by the square of a factor made of `mscale_all_dim`."""
    parameters, mscale = rope_parameters(config), 1.0
    if rope_kind(parameters) != "default" and parameters.get("mscale_all_dim"):
        factor = positive_float(parameters, "factor", latent.rope.factor)
        mscale += 0.1 * positive_float(parameters, "mscale_all_dim") * math.log(max(factor, 1.0))
    return mscale**2 / math.sqrt(latent.query_dim)


def mixture_layers(config: Config, layers: int, dense: int) -> tuple[bool, ...]:
    """Return for each layer whether it has experts.

    From layer `first_k_dense_replace` on (`dense` if it is missing), those whose number `moe_layer_freq` divides have.
    """
    first, every = non_negative_int(config, "first_k_dense_replace", dense), positive_int(config, "moe_layer_freq", 1)
    return tuple(i >= first and i % every == 0 for i in range(layers))


def _experts(config: Config, layers: int) -> MoESpec:
    size = positive_int(config, "moe_intermediate_size", 1407)
    return MoESpec(
        num_experts=positive_int(config, "num_experts", positive_int(config, "n_routed_experts", 64)),
        intermediate_size=size,
        routing=_routing(config),
        layers=mixture_layers(config, layers, 0),
        shared_size=size * non_negative_int(config, "n_shared_experts", 2),
    )


def _routing(config: Config) -> RoutingSpec:
    if (config.get("scoring_func") or "softmax") != "softmax":
        raise Unsupported(f"config.json: scoring_func {config['scoring_func']!r} is not supported for deepseek_v2")
    if flag(config, "norm_topk_prob", False):
        raise Unsupported(
            "config.json: norm_topk_prob is not supported for deepseek_v2, which does not normalize weights"
        )
    method = config.get("topk_method") or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise Unsupported(
            f"config.json: topk_method {method!r} is not supported; supported are greedy, group_limited_greedy"
        )
    grouped = method == "group_limited_greedy"
    return RoutingSpec(
        top_k=positive_int(config, "num_experts_per_tok", 6),
        normalize=False,
        scale=positive_float(config, "routed_scaling_factor", 1.0),
        groups=positive_int(config, "n_group") if grouped else 1,
        top_groups=positive_int(config, "topk_group") if grouped else 1,
        wide=True,
    )


NAMES = TensorNames(
    experts=ExpertNames(
        shared_up=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        shared_down="mlp.shared_experts.down_proj",
    )
)
FAMILY = ModelFamily(
    architectures=("DeepseekV2ForCausalLM",),
    model_type="deepseek_v2",
    read=read,
    names=NAMES,
    experts=(NAMES.experts, NAMES.experts.stacked()),
)
