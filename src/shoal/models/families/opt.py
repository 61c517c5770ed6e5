"""OPT: learned positions that begin at row 2 of their table.

The 350m model applies norms after the addition to the stream, and has projections after embedding and before the head.
"""

from shoal.models.config_json.fields import activation, divided_head_dim, dtype_name, flag, layer_count, positive_int
from shoal.models.spec import AttentionSpec, Config, ModelFamily, ModelSpec, NormSpec, TensorNames


def read(config: Config) -> ModelSpec:
    hidden, heads = positive_int(config, "hidden_size", 768), positive_int(config, "num_attention_heads", 12)
    head_dim = divided_head_dim(hidden, heads)
    bias, affine = flag(config, "enable_bias", True), flag(config, "layer_norm_elementwise_affine", True)
    before = flag(config, "do_layer_norm_before", True)
    return ModelSpec(
        family="opt",
        hidden_size=hidden,
        num_layers=layer_count(config, 12),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=positive_int(config, "ffn_dim", 3072),
        vocab_size=positive_int(config, "vocab_size", 50272),
        max_positions=positive_int(config, "max_position_embeddings", 2048),
        attention=(AttentionSpec(head_dim**-0.5),),
        norm=NormSpec("layer", 1e-5, weight=affine, bias=affine),
        tie_embeddings=flag(config, "tie_word_embeddings", True),
        dtype=dtype_name(config),
        layout="pre" if before else "norm_sum",
        final_norm=before and not flag(config, "_remove_final_layer_norm", False),
        activation=activation(config, "relu", "activation_function"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        up_bias=bias,
        down_bias=bias,
        embedding_size=positive_int(config, "word_embed_proj_dim", hidden),
        position_offset=2,
    )


NAMES = TensorNames(
    final_norm="final_layer_norm",
    attention_norm="self_attn_layer_norm",
    out="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    up=("fc1",),
    down="fc2",
)
FAMILY = ModelFamily(
    architectures=("OPTForCausalLM",),
    model_type="opt",
    read=read,
    names=NAMES,
    prefixes=("model.decoder.", "decoder.", ""),
    heads=("lm_head",),
)
