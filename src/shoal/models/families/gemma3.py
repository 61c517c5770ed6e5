"""Gemma 3 for text: like Gemma 2, with norms on query and key heads, and another rope in layers with a window."""

import dataclasses

from shoal.models.config_json.fields import positive_int, sliding_layers, sliding_window
from shoal.models.config_json.rope_fields import read_rope, rope_kind, stretched_positions
from shoal.models.families import gemma2
from shoal.models.spec import Config, ModelFamily, ModelSpec, RopeSpec

_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def read(config: Config) -> ModelSpec:
    positions = positive_int(config, "max_position_embeddings", 131072)
    fixed = {"max_position_embeddings": positions}
    spec = gemma2.read({**dict.fromkeys(_SOFTCAPS), **config, **fixed, "rope_scaling": None, "rope_parameters": None})
    config = {**config, **fixed}
    rotary = _full_rope(config, spec.head_dim)
    full = dataclasses.replace(spec.attention[0], window=None, rope=rotary)
    windowed = dataclasses.replace(full, window=sliding_window(config, 4096), rope=_local_rope(config, spec.head_dim))
    period = positive_int(config, "sliding_window_pattern", 6)
    sliding = sliding_layers(config, [(i + 1) % period != 0 for i in range(spec.num_layers)])
    return dataclasses.replace(
        spec,
        family="gemma3",
        qk_norm=spec.norm,
        # Published lengths are already those after scaling, so they grow only if an original length is named.
        max_positions=stretched_positions(rotary.kind, rotary.factor, rotary.original_max_positions, positions),
        attention=tuple(windowed if slides else full for slides in sliding),
    )


def _full_rope(config: Config, head_dim: int) -> RopeSpec:
    """Return the rope of layers without a window: `rope_parameters` for these layers, overridden by `rope_scaling`."""
    own, scaling = (config.get("rope_parameters") or {}).get("full_attention"), config.get("rope_scaling") or {}
    parameters = {**(own or {}), **scaling}
    if scaling:  # transformers ignores `type` here, and would not scale a rope that has no `rope_type`
        parameters["rope_type"] = rope_kind(scaling)
    return read_rope(
        {**config, "rope_scaling": None, "rope_parameters": {"full_attention": parameters}}, head_dim, theta=1e6
    )


def _local_rope(config: Config, head_dim: int) -> RopeSpec:
    """Return the rope of layers with a window. It has its own base, and `rope_scaling` does not apply to it."""
    own = (config.get("rope_parameters") or {}).get("sliding_attention")
    local = {
        "rope_scaling": None,
        "rope_theta": config.get("rope_local_base_freq"),
        "rope_parameters": {"sliding_attention": own},
    }
    return read_rope({**config, **local}, head_dim, layer_type="sliding_attention")


FAMILY = ModelFamily(architectures=("Gemma3ForCausalLM",), model_type="gemma3_text", read=read, names=gemma2.NAMES)
