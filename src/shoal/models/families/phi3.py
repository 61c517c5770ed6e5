"""Phi 3 and 4: like llama, with queries, keys and values stored in one tensor, and gate and up in another."""

import dataclasses

from shoal.models.config_json.fields import positive_float, positive_int, sliding_window
from shoal.models.config_json.rope_fields import read_rope, rope_kind, rope_parameters
from shoal.models.families import llama
from shoal.models.spec import Config, ModelFamily, ModelSpec, NormSpec, RopeSpec, TensorNames, Unsupported


def read(config: Config) -> ModelSpec:
    positions = positive_int(config, "max_position_embeddings", 4096)
    fixed = {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": positions}
    spec = llama.read({**config, **fixed, "rope_scaling": None, "rope_parameters": None})
    (attention,) = spec.attention
    rotary = _rope({**config, **fixed}, spec.head_dim)
    return dataclasses.replace(
        spec,
        family="phi3",
        attention=(dataclasses.replace(attention, window=sliding_window(config, None), rope=rotary),),
        norm=NormSpec("rms", positive_float(config, "rms_norm_eps", 1e-5)),
    )


def _rope(config: Config, head_dim: int) -> RopeSpec:
    """Return a rope with LongRoPE scaling, which the first files call "su" or "yarn", or without scaling."""
    parameters = rope_parameters(config)
    kind = "longrope" if rope_kind(parameters) in ("su", "yarn") else rope_kind(parameters)
    if kind not in ("default", "longrope"):
        raise Unsupported(
            f"config.json: rope scaling {kind!r} is not supported for phi3; supported are default and longrope"
        )
    original = positive_int(config, "original_max_position_embeddings", 4096)
    spelled = {"rope_scaling": {**parameters, "rope_type": kind}, "original_max_position_embeddings": original}
    return read_rope({**config, **spelled}, head_dim, rotated_share=1.0)


NAMES = TensorNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))
FAMILY = ModelFamily(architectures=("Phi3ForCausalLM",), model_type="phi3", read=read, names=NAMES)
