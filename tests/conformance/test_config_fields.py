"""Tests of fields of config.json that change the arithmetic: each family uses the fields that transformers uses."""

import json
from pathlib import Path
from typing import Any

import pytest

from conformance.test_greedy_tokens import assert_same, generate, make_prompts
from shoal import LLM
from shoal.errors import CheckpointError, UserError
from support.raw_configs import raw_config, save_raw

pytestmark = pytest.mark.slow

PROMPTS = make_prompts([5, 40], seed=3)
STEPS = 8

LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OWN_BASE = {"rope_type": "default", "rope_theta": 500.0}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]
WHOLE_HEADS = (
    *("deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3", "granitemoe", "llama", "mistral", "mixtral"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
)

ROPES: list[tuple[str, dict[str, Any]]] = [
    *((family, {"partial_rotary_factor": 0.5}) for family in WHOLE_HEADS),
    ("llama", {"rope_parameters": HALF}),
    ("phi", {"rope_parameters": HALF}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("gpt_neox", {"rotary_pct": 0.5}),
    ("gpt_neox", {"partial_rotary_factor": 0.5}),
    ("llama", {"rope_parameters": OWN_BASE, "rope_scaling": LINEAR}),
    ("llama", {"rope_theta": 500.0, "rope_scaling": DYNAMIC}),
    ("qwen2", {"rope_scaling": DYNAMIC}),
    ("phi", {"rope_scaling": {**YARN, "factor": None}}),
    ("llama", {"rope_scaling": {**YARN, "factor": None}}),
    ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 32}),
    ("qwen3", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}),
    ("mistral", {"rope_scaling": {**YARN, "truncate": False, "beta_fast": 16, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    ("gemma3", {"rope_parameters": OWN_BASE}),
    ("gemma3", {"rope_scaling": LINEAR, "rope_theta": 500.0, "rope_local_base_freq": 100.0}),
    ("gemma3", {"rope_parameters": {"full_attention": OWN_BASE, "sliding_attention": None}, "rope_scaling": LINEAR}),
    ("deepseek_v2", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    ("deepseek_v3", {"rope_scaling": {**LINEAR, "mscale_all_dim": 1.3}}),
]
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("gemma", {"hidden_act": "gelu"}),
    ("gemma", {"hidden_activation": "silu"}),
    ("gemma2", {"hidden_activation": "gelu"}),
    ("gemma2", {"hidden_act": "silu"}),
    ("gemma3", {"hidden_act": "relu"}),
    ("gemma3", {"hidden_activation": "gelu"}),
    ("phi", {"head_dim": 16}),
    ("phi3", {"head_dim": 16}),
    ("qwen2", {"head_dim": 16}),
    ("mixtral", {"num_experts": 4}),
    ("deepseek_v2", {"num_experts": 6}),
    ("deepseek_v3", {"num_local_experts": 12}),
    ("gpt2", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    ("gpt2", {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"activation_function": "relu", "n_inner": 80}),
    ("mistral", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"head_dim": 8, "layer_types": SLIDES}),
    ("mistral", {"head_dim": 8, "layer_types": ["attention", "sliding_attention", "full_attention"]}),
    ("qwen2", {"attention_bias": False, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "layer_types": SLIDES}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": SLIDES}),
    ("qwen2", {"sliding_window": 8, "max_window_layers": 1}),
    ("granitemoe", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"pretraining_tp": 2, "sliding_window": 8, "num_key_value_heads": None, "head_dim": None}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("opt", {"activation_function": "gelu"}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 5}),
    ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False, "routed_scaling_factor": 0.7}),
]


def name_of(value: object) -> str | None:
    return json.dumps(value).replace('"', "") if isinstance(value, dict) else None


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), ROPES + OTHERS, ids=name_of)
def test_a_field(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    folder = save_raw(family, changes, tmp_path / "model")
    assert_same(folder, PROMPTS, generate(folder, PROMPTS, STEPS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "model_impl"),
    [({"tensor_parallel_size": 3}, "shoal"), ({"pipeline_parallel_size": 2}, "transformers")],
)
@pytest.mark.parametrize("rope", [DYNAMIC, LINEAR, None])
def test_ropes_in_other_layouts(tmp_path: Path, options: Any, model_impl: str, rope: dict[str, Any] | None) -> None:
    changes = {"rope_scaling": rope} if rope else {"partial_rotary_factor": 0.5}
    folder = save_raw("llama", changes, tmp_path / "model")
    assert_same(folder, PROMPTS, generate(folder, PROMPTS, STEPS, model_impl=model_impl, **options))


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("gpt_neox", {"head_dim": 16}, "head_dim 16 is not hidden_size / num_attention_heads, 8"),
        ("phi3", {"rope_scaling": LINEAR}, "rope scaling 'linear' is not supported for phi3"),
    ],
)
def test_fields_that_transformers_can_not_run_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], says: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw_config(family, changes)))
    with pytest.raises(CheckpointError, match=says):
        LLM(str(tmp_path), load_format="dummy")


# --- texts longer than the model's original length --------------------------------------------------------------------

SHORT, LONG = [1.0, 1.1, 1.3, 1.7], [2.0, 3.0, 4.0, 5.0]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
ORIGINAL = {"original_max_position_embeddings": 64}
BEYOND = make_prompts([90], seed=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "model_impl"),
    [
        ("phi3", {"rope_scaling": LONGROPE, **ORIGINAL}, "shoal"),
        ("phi3", {"rope_scaling": LONGROPE, **ORIGINAL}, "transformers"),
        ("phi3", {"rope_scaling": {**LONGROPE, **ORIGINAL, "type": "su"}, **ORIGINAL}, "shoal"),
        ("phi3", {"rope_scaling": {**LONGROPE, "type": "yarn", "factor": 9.0}, **ORIGINAL}, "shoal"),
        ("llama", {"rope_scaling": {**LONGROPE, "attention_factor": 1.3}, **ORIGINAL}, "shoal"),
        ("llama", {"rope_scaling": {**LONGROPE, "attention_factor": 1.3}, **ORIGINAL}, "transformers"),
        ("qwen2", {"rope_scaling": {**LONGROPE, **ORIGINAL}}, "shoal"),
    ],
)
def test_longrope_within_the_original_length(
    tmp_path: Path, family: str, changes: dict[str, Any], model_impl: str
) -> None:
    folder = save_raw(family, changes, tmp_path / "model")
    assert_same(folder, PROMPTS, generate(folder, PROMPTS, STEPS, max_model_len=64, model_impl=model_impl))
    for longer in ({}, {"max_model_len": 65}):
        with pytest.raises(UserError, match=r"more than its original 64: .* use --max-model-len 64 or less"):
            generate(folder, PROMPTS, STEPS, model_impl=model_impl, **longer)


@pytest.mark.parametrize("model_impl", ["shoal", "transformers"])
@pytest.mark.parametrize("scaling", [LINEAR, {**LLAMA3, "original_max_position_embeddings": 32}, {**YARN, "factor": 8}])
def test_scaling_lets_texts_be_longer(tmp_path: Path, scaling: dict[str, Any], model_impl: str) -> None:
    """Scaling in --hf-overrides has the same effect as in config.json, and keeps the base."""
    positions = {"max_position_embeddings": 32, "rope_parameters": OWN_BASE}
    folder = save_raw("llama", positions, tmp_path / "model")
    said = {**positions, "rope_parameters": {**scaling, "rope_theta": 500.0}}
    meant = save_raw("llama", said, tmp_path / "meant")
    options: dict[str, Any] = {"hf_overrides": {"rope_scaling": scaling}, "model_impl": model_impl}
    outputs = generate(folder, BEYOND, STEPS, max_model_len=100, tensor_parallel_size=2, **options)
    assert_same(meant, BEYOND, outputs)
    with pytest.raises(UserError, match=r"--max-model-len 9999 is more than the model's \d+ positions \(rope scaling"):
        generate(folder, BEYOND, STEPS, max_model_len=9999, **options)
    with pytest.raises(
        UserError, match="is more than the model's 32 positions: lower it, or give the model more positions by a rope_"
    ):
        generate(folder, BEYOND, STEPS, max_model_len=100, model_impl=model_impl)


def test_dynamic_scaling_beyond_the_length_is_refused(tmp_path: Path) -> None:
    folder = save_raw("llama", {"rope_scaling": DYNAMIC}, tmp_path / "model")
    for model_impl in ("shoal", "transformers"):
        with pytest.raises(UserError, match="--max-model-len 300 is more than"):
            generate(folder, PROMPTS, STEPS, max_model_len=300, model_impl=model_impl)
