"""GPT-NeoX and Pythia: a quarter of each head is rotated; queries, keys and values are interleaved by head."""

from shoal.errors import CheckpointError
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
    hidden, heads = positive_int(config, "hidden_size", 6144), positive_int(config, "num_attention_heads", 64)
    head_dim = divided_head_dim(hidden, heads)
    if positive_int(config, "head_dim", head_dim) != head_dim:
        raise CheckpointError(
            f"config.json: head_dim {config['head_dim']} is not hidden_size / num_attention_heads, {head_dim}"
        )
    bias = flag(config, "attention_bias", True)
    config = {**config, "max_position_embeddings": positive_int(config, "max_position_embeddings", 2048)}
    rotary = read_rope(config, head_dim, theta_key="rotary_emb_base", rotated_share=0.25, share_key="rotary_pct")
    return ModelSpec(
        family="gpt_neox",
        hidden_size=hidden,
        num_layers=layer_count(config, 44),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=positive_int(config, "intermediate_size", 24576),
        vocab_size=positive_int(config, "vocab_size", 50432),
        max_positions=max_positions(config, rotary),
        attention=(AttentionSpec(head_dim**-0.5, rotary),),
        norm=NormSpec("layer", positive_float(config, "layer_norm_eps", 1e-5), bias=True),
        tie_embeddings=flag(config, "tie_word_embeddings", False),
        dtype=dtype_name(config),
        layout="parallel" if flag(config, "use_parallel_residual", True) else "pre",
        activation=activation(config, "gelu", "hidden_act"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        up_bias=True,
        down_bias=True,
    )


NAMES = TensorNames(
    embedding="embed_in",
    final_norm="final_layer_norm",
    qkv=("attention.query_key_value",),
    interleaved=True,
    out="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
FAMILY = ModelFamily(
    architectures=("GPTNeoXForCausalLM",),
    model_type="gpt_neox",
    read=read,
    names=NAMES,
    prefixes=("gpt_neox.", ""),
    heads=("embed_out", "lm_head"),
)
