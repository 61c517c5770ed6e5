"""Llama 2 and 3, and all models with the same structure."""

from shoal.models.config_json.fields import activation, dtype_name, flag, layer_count, positive_float, positive_int
from shoal.models.config_json.rope_fields import max_positions, read_rope
from shoal.models.spec import AttentionSpec, Config, ModelFamily, ModelSpec, NormSpec


def read(config: Config) -> ModelSpec:
    hidden, heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
    head_dim = positive_int(config, "head_dim", hidden // heads)
    config = {**config, "max_position_embeddings": positive_int(config, "max_position_embeddings", 2048)}
    rotary = read_rope(config, head_dim)
    bias, mlp_bias = flag(config, "attention_bias", False), flag(config, "mlp_bias", False)
    return ModelSpec(
        family="llama",
        hidden_size=hidden,
        num_layers=layer_count(config),
        num_heads=heads,
        num_kv_heads=positive_int(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=positive_int(config, "intermediate_size"),
        vocab_size=positive_int(config, "vocab_size"),
        max_positions=max_positions(config, rotary),
        attention=(AttentionSpec(head_dim**-0.5, rotary),),
        norm=NormSpec("rms", positive_float(config, "rms_norm_eps", 1e-6)),
        tie_embeddings=flag(config, "tie_word_embeddings", False),
        dtype=dtype_name(config),
        activation=activation(config, "silu", "hidden_act"),
        qkv_bias=bias,
        out_bias=bias,
        up_bias=mlp_bias,
        down_bias=mlp_bias,
    )


FAMILY = ModelFamily(architectures=("LlamaForCausalLM",), model_type="llama", read=read)
