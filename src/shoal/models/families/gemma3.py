"""Gemma 3, text: Gemma 2 with norms over query and key heads, and a rope of its own under the sliding window."""

import dataclasses

from shoal.models.families import gemma2
from shoal.models.fields import layer_types, positive, window
from shoal.models.rope_fields import kind_of, rope, stretched
from shoal.models.spec import Config, ModelFamily, ModelSpec, RopeSpec

_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def read(config: Config) -> ModelSpec:
    positions = positive(config, "max_position_embeddings", 131072)
    fixed = {"max_position_embeddings": positions}
    spec = gemma2.read({**dict.fromkeys(_SOFTCAPS), **config, **fixed, "rope_scaling": None, "rope_parameters": None})
    config = {**config, **fixed}
    rotary = _full_rope(config, spec.head_dim)
    full = dataclasses.replace(spec.attention[0], window=None, rope=rotary)
    windowed = dataclasses.replace(full, window=window(config, 4096), rope=_local_rope(config, spec.head_dim))
    period = positive(config, "sliding_window_pattern", 6)
    sliding = layer_types(config, [(i + 1) % period != 0 for i in range(spec.num_layers)])
    return dataclasses.replace(
        spec,
        family="gemma3",
        qk_norm=spec.norm,
        # Published lengths are those behind the scaling: more is only where the original length is named.
        max_positions=stretched(rotary.kind, rotary.factor, rotary.original_max_positions, positions),
        attention=tuple(windowed if slides else full for slides in sliding),
    )


def _full_rope(config: Config, head_dim: int) -> RopeSpec:
    """Without the window: `rope_scaling` is put over what `rope_parameters` says of these layers."""
    said, scaling = (config.get("rope_parameters") or {}).get("full_attention"), config.get("rope_scaling") or {}
    parameters = {**(said or {}), **scaling}
    if scaling:  # transformers reads no `type` here, and would take such a rope for one that is not scaled
        parameters["rope_type"] = kind_of(scaling)
    return rope(
        {**config, "rope_scaling": None, "rope_parameters": {"full_attention": parameters}}, head_dim, theta=1e6
    )


def _local_rope(config: Config, head_dim: int) -> RopeSpec:
    """Under the window: with a base of its own, and never scaled by `rope_scaling`."""
    said = (config.get("rope_parameters") or {}).get("sliding_attention")
    local = {
        "rope_scaling": None,
        "rope_theta": config.get("rope_local_base_freq"),
        "rope_parameters": {"sliding_attention": said},
    }
    return rope({**config, **local}, head_dim, layer_type="sliding_attention")


FAMILY = ModelFamily(architectures=("Gemma3ForCausalLM",), model_type="gemma3_text", read=read, names=gemma2.NAMES)
