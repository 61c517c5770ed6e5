"""Phi 3 and 4: llama with queries, keys and values in one tensor, gate and up in another."""

import dataclasses

from shoal.models.families import llama
from shoal.models.fields import number, positive, window
from shoal.models.spec import Config, Family, ModelSpec, NormSpec, TensorNames, Unsupported


def read(config: Config) -> ModelSpec:
    positions = positive(config, "max_position_embeddings", 4096)
    fixed = {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": positions}
    spec = llama.read({**config, **fixed})
    (attention,) = spec.attention
    kind = "default" if attention.rope is None else attention.rope.kind
    if kind != "default":  # the first files say "yarn" where they mean longrope
        raise Unsupported(f"config.json: rope scaling {kind!r} is not supported for phi3; supported is default")
    return dataclasses.replace(
        spec,
        family="phi3",
        attention=(dataclasses.replace(attention, window=window(config, None)),),
        norm=NormSpec("rms", number(config, "rms_norm_eps", 1e-5)),
    )


NAMES = TensorNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))
FAMILY = Family(architectures=("Phi3ForCausalLM",), model_type="phi3", read=read, names=NAMES)
