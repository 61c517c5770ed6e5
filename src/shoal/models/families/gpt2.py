"""GPT-2: learned positions, LayerNorm, a plain MLP, and matrices that lie as [in, out]."""

from shoal.models.fields import activation, dtype_name, flag, head_dim_of, number, positive
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
    hidden, heads = positive(config, "n_embd", 768), positive(config, "n_head", 12)
    layers, head_dim = positive(config, "n_layer", 12), head_dim_of(hidden, heads)
    return ModelSpec(
        family="gpt2",
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=positive(config, "n_inner", 4 * hidden),
        vocab_size=positive(config, "vocab_size", 50257),
        max_positions=positive(config, "n_positions", 1024),
        attention=_attention(config, head_dim, layers),
        norm=NormSpec("layer", number(config, "layer_norm_epsilon", 1e-5), bias=True),
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
