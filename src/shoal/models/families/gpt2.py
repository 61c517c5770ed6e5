"""GPT-2: learned positions, LayerNorm, an MLP without a gate, and matrices that are stored as [in, out]."""

from shoal.models.config_json.fields import (
    activation,
    divided_head_dim,
    dtype_name,
    flag,
    layer_count,
    positive_float,
    positive_int,
)
from shoal.models.spec import AttentionSpec, Config, ModelFamily, ModelSpec, NormSpec, TensorNames, Unsupported

_OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}


def read(config: Config) -> ModelSpec:
    if config.get("add_cross_attention"):
        raise Unsupported("config.json: add_cross_attention is not supported")
    config = {**config, **{key: config[other] for key, other in _OTHER_NAMES.items() if config.get(other) is not None}}
    hidden, heads = positive_int(config, "n_embd", 768), positive_int(config, "n_head", 12)
    layers, head_dim = layer_count(config, 12, key="n_layer"), divided_head_dim(hidden, heads)
    return ModelSpec(
        family="gpt2",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=positive_int(config, "n_inner", 4 * hidden),
        vocab_size=positive_int(config, "vocab_size", 50257),
        max_positions=positive_int(config, "n_positions", 1024),
        attention=_attention(config, head_dim, layers),
        norm=NormSpec("layer", positive_float(config, "layer_norm_epsilon", 1e-5), bias=True),
        tie_embeddings=flag(config, "tie_word_embeddings", True),
        dtype=dtype_name(config),
        activation=activation(config, "gelu_new", "activation_function"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        up_bias=True,
        down_bias=True,
        position_offset=0,
    )


def _attention(config: Config, head_dim: int, layers: int) -> tuple[AttentionSpec, ...]:
    scale = head_dim**-0.5 if flag(config, "scale_attn_weights", True) else 1.0
    if flag(config, "scale_attn_by_inverse_layer_idx", False):
        return tuple(AttentionSpec(scale / (i + 1)) for i in range(layers))
    return (AttentionSpec(scale),)


NAMES = TensorNames(
    embedding="wte",
    positions="wpe",
    final_norm="ln_f",
    layer="h.{i}.",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    mlp_norm="ln_2",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    transposed=True,
)
FAMILY = ModelFamily(
    architectures=("GPT2LMHeadModel",),
    model_type="gpt2",
    read=read,
    names=NAMES,
    prefixes=("transformer.", ""),
    heads=("lm_head",),
)
