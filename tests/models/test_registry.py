"""config.json in the spellings there are, and everything that is none."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import CheckpointError
from shoal.models.registry import FAMILIES, read_config, read_spec, tensor_names
from shoal.models.spec import ModelSpec, RopeSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 112,
    "vocab_size": 301,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(folder: Path, config: object) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps(config))
    return read_spec(folder)


def refusal(folder: Path, config: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, config)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_llama(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA) == ModelSpec(
        family="llama",
        hidden_size=64,
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=112,
        vocab_size=301,
        max_positions=256,
        norm_eps=1e-5,
        rope=RopeSpec(10000.0),
        tie_embeddings=False,
        dtype="float32",
    )


def test_llama_without_what_may_be_left_out(tmp_path: Path) -> None:
    few = {k: v for k, v in LLAMA.items() if k not in {"num_key_value_heads", "max_position_embeddings"}}
    spec = read(tmp_path, {**few, "head_dim": None})
    assert (spec.num_kv_heads, spec.head_dim, spec.max_positions) == (8, 8, 2048)


def test_biases(tmp_path: Path) -> None:
    spec = read(tmp_path, {**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert (spec.qkv_bias, spec.out_bias, spec.mlp_bias) == (True, True, True)


def test_qwen3(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}
    spec = read(tmp_path, config)
    assert (spec.family, spec.qk_norm, spec.head_dim) == ("qwen3", True, 128)
    assert read(tmp_path, {**config, "head_dim": 32}).head_dim == 32
    assert tensor_names(spec).q_norm == "self_attn.q_norm"
    assert "use_sliding_window" in refusal(tmp_path, {**config, "use_sliding_window": True})


def test_one_of_several_architectures(tmp_path: Path) -> None:
    assert read(tmp_path, {**LLAMA, "architectures": ["Other", "LlamaForCausalLM"]}).family == "llama"


@pytest.mark.parametrize("name", ["llama", "llama3", "llama_6_2", "qwen3"])
def test_what_transformers_writes(checkpoint: Callable[[str], Path], name: str) -> None:
    from transformers import AutoConfig

    folder = checkpoint(name)
    spec, config = read_spec(folder), AutoConfig.from_pretrained(folder)
    assert spec.hidden_size == config.hidden_size
    assert spec.num_heads == config.num_attention_heads
    assert spec.num_kv_heads == config.num_key_value_heads
    assert spec.head_dim == config.head_dim
    assert spec.vocab_size == config.vocab_size
    assert spec.tie_embeddings == config.tie_word_embeddings
    assert spec.norm_eps == config.rms_norm_eps
    assert spec.dtype == "float32"
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.rope.kind == config.rope_parameters["rope_type"]


# --- spellings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": None, "rope_parameters": {"rope_type": "llama3", **SCALING}},
    ],
)
def test_llama3_scaling(tmp_path: Path, spelling: dict[str, Any]) -> None:
    assert read(tmp_path, {**LLAMA, **spelling}).rope == RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
)
def test_linear_scaling(tmp_path: Path, spelling: dict[str, Any]) -> None:
    assert read(tmp_path, {**LLAMA, **spelling}).rope == RopeSpec(10000.0, "linear", 2.0)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 1000000, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 5.0},
    ],
)
def test_no_scaling(tmp_path: Path, spelling: dict[str, Any]) -> None:
    assert read(tmp_path, {**LLAMA, **spelling}).rope == RopeSpec(1e6)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", 7])
def test_other_scaling(tmp_path: Path, kind: object) -> None:
    message = refusal(tmp_path, {**LLAMA, "rope_scaling": {"rope_type": kind, "factor": 2.0}})
    assert repr(kind) in message
    assert "supported are default, linear, llama3" in message


@pytest.mark.parametrize("missing", [*SCALING])
def test_incomplete_scaling(tmp_path: Path, missing: str) -> None:
    scaling = {key: value for key, value in SCALING.items() if key != missing}
    message = refusal(tmp_path, {**LLAMA, "rope_scaling": {"rope_type": "llama3", **scaling}})
    assert missing in message
    assert "config.json" in message


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_dtype(tmp_path: Path, spelling: dict[str, Any], dtype: str) -> None:
    assert read(tmp_path, {**LLAMA, **spelling}).dtype == dtype


# --- refusals ----------------------------------------------------------------------------------------------------

SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]


@pytest.mark.parametrize("key", SIZES)
def test_missing_size(tmp_path: Path, key: str) -> None:
    message = refusal(tmp_path, {k: v for k, v in LLAMA.items() if k != key})
    assert f"{key} must be a positive integer, got None" in message


def test_more_heads_than_width(tmp_path: Path) -> None:
    assert "head_dim must be a positive integer, got 0" in refusal(tmp_path, {**LLAMA, "num_attention_heads": 128})


def test_activation(tmp_path: Path) -> None:
    message = refusal(tmp_path, {**LLAMA, "hidden_act": "gelu"})
    assert "'gelu'" in message
    assert "silu" in message


def test_names_of_what_is_supported(tmp_path: Path) -> None:
    message = refusal(tmp_path, {**LLAMA, "architectures": ["MambaForCausalLM"]})
    assert "MambaForCausalLM" in message
    assert all(name in message for family in FAMILIES.values() for name in family.architectures)


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_config(tmp_path)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
_KEYS = [*LLAMA, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "dtype", "mlp_bias"]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES, min_size=1, max_size=3), st.sampled_from(list(FAMILIES)))
def test_random_values(tmp_path: Path, changes: dict[str, Any], family: str) -> None:
    """A spec or a CheckpointError, and nothing else."""
    config = {**LLAMA, "architectures": list(FAMILIES[family].architectures), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(CheckpointError):
        spec = read_spec(tmp_path)
        assert spec.num_heads % spec.num_kv_heads == 0
        assert min(spec.hidden_size, spec.num_layers, spec.head_dim, spec.vocab_size, spec.max_positions) >= 1


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=100) | _VALUES.map(lambda value: json.dumps(value).encode()))
def test_random_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        read_spec(tmp_path)
