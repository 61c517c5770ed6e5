"""Qwen3, dense: llama with a norm over each query and key head."""

import dataclasses

from shoal.errors import CheckpointError
from shoal.models.families import llama
from shoal.models.spec import Config, Family, ModelSpec


def read(config: Config) -> ModelSpec:
    if config.get("use_sliding_window"):
        raise CheckpointError("config.json: use_sliding_window is not supported for qwen3")
    spec = llama.read({"head_dim": 128, **config})
    return dataclasses.replace(spec, family="qwen3", qk_norm=True)


FAMILY = Family(architectures=("Qwen3ForCausalLM",), read=read)
