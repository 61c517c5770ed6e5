"""Llama 2 and 3, and what has their shape."""

from shoal.errors import CheckpointError
from shoal.models.spec import Config, Family, ModelSpec, dtype_name, positive, rope


def read(config: Config) -> ModelSpec:
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported for llama; supported is silu")
    bias = bool(config.get("attention_bias", False))
    return ModelSpec(
        family="llama",
        hidden_size=hidden,
        num_layers=positive(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=positive(config, "num_key_value_heads", heads),
        head_dim=positive(config, "head_dim", hidden // heads),
        intermediate_size=positive(config, "intermediate_size"),
        vocab_size=positive(config, "vocab_size"),
        max_positions=positive(config, "max_position_embeddings", 2048),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope(config),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=dtype_name(config),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


FAMILY = Family(architectures=("LlamaForCausalLM",), read=read)
