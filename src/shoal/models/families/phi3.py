"""Phi 3 and 4: llama with queries, keys and values in one tensor, gate and up in another."""

import dataclasses

from shoal.models.families import llama
from shoal.models.fields import number, positive, window
from shoal.models.rope_fields import kind_of, parameters_of, rope
from shoal.models.spec import Config, ModelFamily, ModelSpec, NormSpec, RopeSpec, TensorNames, Unsupported


def read(config: Config) -> ModelSpec:
    positions = positive(config, "max_position_embeddings", 4096)
    fixed = {"attention_bias": False, "mlp_bias": False, "max_position_embeddings": positions}
    spec = llama.read({**config, **fixed, "rope_scaling": None, "rope_parameters": None})
    (attention,) = spec.attention
    rotary = _rope({**config, **fixed}, spec.head_dim)
    return dataclasses.replace(
        spec,
        family="phi3",
        attention=(dataclasses.replace(attention, window=window(config, None), rope=rotary),),
        norm=NormSpec("rms", number(config, "rms_norm_eps", 1e-5)),
    )


def _rope(config: Config, head_dim: int) -> RopeSpec:
    """Longrope, which the first files call "su" or "yarn", or no scaling."""
    parameters = parameters_of(config)
    kind = "longrope" if kind_of(parameters) in ("su", "yarn") else kind_of(parameters)
    if kind not in ("default", "longrope"):
        raise Unsupported(f"config.json: rope scaling {kind!r} is not supported for phi3; it is default or longrope")
    original = positive(config, "original_max_position_embeddings", 4096)
    spelled = {"rope_scaling": {**parameters, "rope_type": kind}, "original_max_position_embeddings": original}
    return rope({**config, **spelled}, head_dim, partial=1.0)


NAMES = TensorNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))
FAMILY = ModelFamily(architectures=("Phi3ForCausalLM",), model_type="phi3", read=read, names=NAMES)
