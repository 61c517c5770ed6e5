"""Dense Qwen3: like Qwen2, with a norm on each query and key head, and without the biases."""

import dataclasses

from shoal.models.config_json.fields import flag
from shoal.models.families import qwen2
from shoal.models.spec import Config, ModelFamily, ModelSpec


def read(config: Config) -> ModelSpec:
    spec = qwen2.read({**config, "head_dim": config.get("head_dim") or 128})
    bias = flag(config, "attention_bias", False)
    return dataclasses.replace(spec, family="qwen3", qk_norm=spec.norm, qkv_bias=bias, out_bias=bias)


FAMILY = ModelFamily(architectures=("Qwen3ForCausalLM",), model_type="qwen3", read=read)
