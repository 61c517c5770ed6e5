"""Phi 1, 1.5 and 2: attention and MLP in parallel after one norm, partly rotated heads, biases in all layers."""

from shoal.models.config_json.fields import (
    activation,
    divided_head_dim,
    dtype_name,
    flag,
    layer_count,
    positive_float,
    positive_int,
)
from shoal.models.config_json.rope_fields import max_positions, read_rope
from shoal.models.spec import AttentionSpec, Config, ModelFamily, ModelSpec, NormSpec, TensorNames


def read(config: Config) -> ModelSpec:
    hidden, heads = positive_int(config, "hidden_size", 2048), positive_int(config, "num_attention_heads", 32)
    head_dim = divided_head_dim(hidden, heads) if config.get("head_dim") is None else positive_int(config, "head_dim")
    config = {**config, "max_position_embeddings": positive_int(config, "max_position_embeddings", 2048)}
    rotary = read_rope(config, head_dim, rotated_share=0.5)
    norm = NormSpec("layer", positive_float(config, "layer_norm_eps", 1e-5), bias=True)
    return ModelSpec(
        family="phi",
        hidden_size=hidden,
        num_layers=layer_count(config, 24),
        num_heads=heads,
        num_kv_heads=positive_int(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=positive_int(config, "intermediate_size", 8192),
        vocab_size=positive_int(config, "vocab_size", 51200),
        max_positions=max_positions(config, rotary),
        attention=(AttentionSpec(head_dim**-0.5, rotary),),
        norm=norm,
        tie_embeddings=flag(config, "tie_word_embeddings", False),
        dtype=dtype_name(config),
        layout="parallel_one",
        qk_norm=norm if flag(config, "qk_layernorm", False) else None,
        activation=activation(config, "gelu_new", "hidden_act"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        up_bias=True,
        down_bias=True,
        head_bias=True,
    )


NAMES = TensorNames(
    final_norm="final_layernorm",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    out="self_attn.dense",
    up=("mlp.fc1",),
    down="mlp.fc2",
)
FAMILY = ModelFamily(architectures=("PhiForCausalLM",), model_type="phi", read=read, names=NAMES)
