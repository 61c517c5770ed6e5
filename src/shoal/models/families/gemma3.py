"""Gemma 3, text: Gemma 2 with norms over query and key heads, and a rope of its own under the sliding window."""

import dataclasses

from shoal.models.families import gemma2
from shoal.models.fields import layer_types, positive, rope, window
from shoal.models.spec import Config, Family, ModelSpec, RopeSpec

_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def read(config: Config) -> ModelSpec:
    fixed = {"max_position_embeddings": positive(config, "max_position_embeddings", 131072)}
    spec = gemma2.read({**dict.fromkeys(_SOFTCAPS), **config, **fixed})
    full = dataclasses.replace(spec.attention[0], window=None, rope=rope(config, spec.head_dim, theta=1e6))
    windowed = dataclasses.replace(full, window=window(config, 4096), rope=_local_rope(config, spec.head_dim))
    period = positive(config, "sliding_window_pattern", 6)
    sliding = layer_types(config, [(i + 1) % period != 0 for i in range(spec.num_layers)])
    return dataclasses.replace(
        spec,
        family="gemma3",
        qk_norm=spec.norm,
        attention=tuple(windowed if slides else full for slides in sliding),
    )


def _local_rope(config: Config, head_dim: int) -> RopeSpec:
    """Under the window: with a base of its own, and never scaled by `rope_scaling`."""
    parameters = config.get("rope_parameters") or {}
    local = {
        "rope_theta": config.get("rope_local_base_freq"),
        "rope_parameters": {"sliding_attention": parameters.get("sliding_attention")},
    }
    return rope(local, head_dim, layer_type="sliding_attention")


FAMILY = Family(architectures=("Gemma3ForCausalLM",), model_type="gemma3_text", read=read, names=gemma2.NAMES)
