"""The tables of rotary angles are the same as those that transformers computes from the same config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.models.layers.rope import rope_tables
from shoal.models.registry import read_spec

LONG = {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG},
        {"rope_type": "yarn", "factor": 4.0, **LONG},
        {"rope_type": "yarn", "factor": 0.5, **LONG},
        {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0, **LONG},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7, **LONG},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5, **LONG},
        {"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5, **LONG},
    ],
)
@pytest.mark.filterwarnings("ignore")  # transformers warns about some of these numbers
def test_tables_are_the_same_as_in_transformers(tmp_path: Path, parameters: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": 10000.0, **parameters}
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 16,
        "vocab_size": 7,
        "max_position_embeddings": 256,
    }
    config = {"architectures": ["LlamaForCausalLM"], **sizes, "rope_parameters": parameters}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_spec(tmp_path)
    rope = spec.attention_of(0).rope
    assert rope is not None
    ours = rope_tables(rope, spec.head_dim, 200, torch.device("cpu"))
    theirs = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=dict(parameters)))
    cos, sin = theirs(torch.zeros(1), torch.arange(200).unsqueeze(0))
    pairs = ours.cos.shape[1]
    assert (spec.head_dim - 2 * pairs == 0) == ("partial_rotary_factor" not in parameters)
    # An angle of 200 radians has a rounding error of 1e-5 in float32.
    torch.testing.assert_close(ours.cos, cos[0, :, :pairs], atol=3e-5, rtol=0)
    torch.testing.assert_close(ours.sin, sin[0, :, :pairs], atol=3e-5, rtol=0)
