"""Specs are read from config.json in all spellings that are in use, and malformed files are refused."""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import CheckpointError
from shoal.models.registry import FAMILIES, read_config, read_spec, tensor_names
from shoal.models.spec import (
    AttentionSpec,
    LatentSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
    RoutingSpec,
    Unsupported,
)
from support.checkpoints import MAKERS

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


def rope_of(spec: ModelSpec, layer: int = 0) -> RopeSpec:
    rope = spec.attention_of(layer).rope
    assert rope is not None
    return rope


def windows(spec: ModelSpec) -> list[int | None]:
    return [spec.attention_of(i).window for i in range(spec.num_layers)]


def refusal(folder: Path, config: object, kind: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        read(folder, config)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_a_llama_config_becomes_a_spec(tmp_path: Path) -> None:
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
        attention=(AttentionSpec(8**-0.5, RopeSpec(10000.0)),),
        norm=NormSpec("rms", 1e-5),
        tie_embeddings=False,
        dtype="float32",
    )


def test_optional_fields_of_llama_may_be_missing(tmp_path: Path) -> None:
    few = {k: v for k, v in LLAMA.items() if k not in {"num_key_value_heads", "max_position_embeddings"}}
    spec = read(tmp_path, {**few, "head_dim": None})
    assert (spec.num_kv_heads, spec.head_dim, spec.max_positions) == (8, 8, 2048)


def test_biases_are_read(tmp_path: Path) -> None:
    spec = read(tmp_path, {**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert (spec.qkv_bias, spec.out_bias, spec.up_bias, spec.down_bias) == (True, True, True, True)


def test_a_qwen3_config_becomes_a_spec(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}
    spec = read(tmp_path, config)
    assert (spec.family, spec.qk_norm, spec.head_dim) == ("qwen3", NormSpec("rms", 1e-5), 128)
    assert (spec.qkv_bias, spec.out_bias) == (False, False)
    assert read(tmp_path, {**config, "head_dim": 32}).head_dim == 32
    assert tensor_names(spec).q_norm == "self_attn.q_norm"


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_models_have_windows_in_some_layers(tmp_path: Path, architecture: str) -> None:
    config = {**LLAMA, "architectures": [architecture], "sliding_window": 16, "max_window_layers": 1}
    assert windows(read(tmp_path, config)) == [None, None, None]
    assert windows(read(tmp_path, {**config, "use_sliding_window": True})) == [None, 16, 16]
    assert windows(read(tmp_path, {**config, "use_sliding_window": True, "sliding_window": None})) == [None] * 3
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(read(tmp_path, {**config, "use_sliding_window": True, "layer_types": kinds})) == [16, None, None]
    assert windows(read(tmp_path, {**config, "layer_types": kinds})) == [None] * 3


MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def mixture(folder: Path, config: dict[str, Any]) -> MoESpec:
    found = read(folder, config).moe
    assert found is not None
    return found


@pytest.mark.parametrize("architecture", ["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"])
def test_the_layers_with_mixtures_are_read(tmp_path: Path, architecture: str) -> None:
    config = {**LLAMA, **MOE, "architectures": [architecture]}
    assert mixture(tmp_path, config).layers == (True, True, True)
    assert mixture(tmp_path, {**config, "decoder_sparse_step": 2}).layers == (False, True, False)
    assert mixture(tmp_path, {**config, "mlp_only_layers": [0, 7]}).layers == (False, True, True)
    assert "mlp_only_layers" in refusal(tmp_path, {**config, "mlp_only_layers": 1})
    assert "7 experts, but has only 6" in refusal(tmp_path, {**config, "num_experts_per_tok": 7})


def test_mixtures_of_qwen_models_are_read(tmp_path: Path) -> None:
    config = {**LLAMA, **MOE, "architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 48}
    spec = read(tmp_path, config)
    assert (spec.moe, spec.qkv_bias, spec.out_bias) == (
        MoESpec(6, 20, RoutingSpec(2, normalize=False), (True,) * 3, shared_size=48, shared_gate=True),
        True,
        False,
    )
    config = {**LLAMA, **MOE, "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True}
    spec = read(tmp_path, config)
    assert (spec.moe, spec.qk_norm) == (MoESpec(6, 20, RoutingSpec(2), (True,) * 3), spec.norm)
    renamed = {key: value for key, value in config.items() if key != "num_experts"} | {"num_local_experts": 6}
    assert read(tmp_path, renamed) == spec, "transformers 5 writes num_local_experts"


def test_windows_of_qwen_mixtures_differ_by_family(tmp_path: Path) -> None:
    """As in transformers, Qwen2 MoE has windows in some layers and Qwen3 MoE in all."""
    used = {**LLAMA, **MOE, "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}
    assert windows(read(tmp_path, {**used, "architectures": ["Qwen2MoeForCausalLM"]})) == [16, None, None]
    assert windows(read(tmp_path, {**used, "architectures": ["Qwen3MoeForCausalLM"]})) == [16] * 3
    unused = {**used, "use_sliding_window": False}
    for architecture in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
        assert windows(read(tmp_path, {**unused, "architectures": [architecture]})) == [None] * 3


def test_a_mixtral_config_becomes_a_spec(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "rope_theta": None}
    spec = read(tmp_path, config)
    assert spec.moe == MoESpec(4, spec.intermediate_size, RoutingSpec(2), (True,) * 3)
    assert (rope_of(spec), windows(spec)) == (RopeSpec(1e6), [None] * 3)


def test_factors_of_granite_are_read(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["GraniteMoeForCausalLM"], "num_local_experts": 4}
    factors = {"embedding_multiplier": 12.0, "attention_multiplier": 0.1, "residual_multiplier": 0.2}
    spec = read(tmp_path, {**config, **factors, "logits_scaling": 8.0})
    assert (spec.embedding_scale, spec.attention_of(0).scale) == (12.0, 0.1)
    assert (spec.residual_scale, spec.logit_scale) == (0.2, 0.125)


def test_mistral_has_a_window_in_all_layers(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert windows(read(tmp_path, config)) == [4096] * 3, "the default of transformers"
    assert windows(read(tmp_path, {**config, "sliding_window": None})) == [None] * 3
    assert "sliding_window" in refusal(tmp_path, {**config, "sliding_window": 0})


def test_gemma3_has_two_ropes(tmp_path: Path) -> None:
    """In the old and the new spelling, the rope of layers with a window has another base and no scaling."""
    config = {**LLAMA, "architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 6, "sliding_window_pattern": 3}
    old = {"rope_theta": 5e5, "rope_local_base_freq": 200.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 200.0},
        }
    }
    for spelling in (old, new):
        spec = read(tmp_path, {**config, **spelling, "sliding_window": 9})
        assert windows(spec) == [9, 9, None] * 2
        assert [rope_of(spec, i) for i in (0, 2)] == [RopeSpec(200.0), RopeSpec(5e5, "linear", 8.0)]
    plain = read(tmp_path, config)
    assert [rope_of(plain, i) for i in (0, 2)] == [RopeSpec(1e4), RopeSpec(1e6)]
    assert (plain.logit_softcap, plain.attention_of(0).softcap) == (None, None)


def test_gemma_configs_become_specs(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "hidden_activation": None}
    spec = read(tmp_path, config)
    assert (spec.activation, spec.head_dim, spec.tie_embeddings, spec.embedding_scale) == ("gelu_tanh", 256, True, 8.0)
    assert spec.norm == NormSpec("rms_wide", 1e-5, one_plus=True)
    refusal(tmp_path, {**config, "use_bidirectional_attention": True}, Unsupported)
    second = read(tmp_path, {**config, "architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": None})
    assert (second.logit_softcap, second.attention_of(0).softcap, second.layout) == (None, 50.0, "sandwich")
    assert second.attention_of(0).scale == 256**-0.5


def test_attention_scales_of_gpt2_are_read(tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_layer": 2, "n_head": 4}
    assert [read(tmp_path, config).attention_of(i).scale for i in range(2)] == [0.25, 0.25]
    by_layer = read(tmp_path, {**config, "scale_attn_by_inverse_layer_idx": True})
    assert [by_layer.attention_of(i).scale for i in range(2)] == [0.25, 0.125]
    assert read(tmp_path, {**config, "scale_attn_weights": False}).attention_of(0).scale == 1.0
    refusal(tmp_path, {**config, "add_cross_attention": True}, Unsupported)
    assert "hidden size 64 is not a multiple of 5 attention heads" in refusal(tmp_path, {**config, "n_head": 5})


def test_the_special_layout_of_opt_350m_is_read(tmp_path: Path) -> None:
    config = {"architectures": ["OPTForCausalLM"], "do_layer_norm_before": False, "word_embed_proj_dim": 512}
    spec = read(tmp_path, config)
    assert (spec.layout, spec.final_norm, spec.embedding_width, spec.hidden_size) == ("norm_sum", False, 512, 768)
    plain = read(tmp_path, {"architectures": ["OPTForCausalLM"], "layer_norm_elementwise_affine": False})
    assert (plain.layout, plain.final_norm, plain.embedding_width) == ("pre", True, 768)
    assert plain.norm == NormSpec("layer", 1e-5, weight=False)


@pytest.mark.parametrize("kind", ["longrope", "yarn", "linear"])
def test_other_kinds_of_rope_are_refused_for_phi3(tmp_path: Path, kind: str) -> None:
    config = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": kind, "factor": 2.0}}
    assert kind in refusal(tmp_path, config, Unsupported)


def test_longrope_may_have_any_of_its_three_names(tmp_path: Path) -> None:
    """If the original length is missing, it is 4096, as in transformers."""
    config = {**LLAMA, "architectures": ["Phi3ForCausalLM"], "max_position_embeddings": 8192}
    for kind in ("longrope", "su", "yarn"):
        spec = read(tmp_path, {**config, "rope_scaling": {"type": kind, "short_factor": [1.5, 2.0, 2.5, 3.0]}})
        rope = rope_of(spec)
        assert (rope.kind, rope.short_factors, spec.steady_positions) == ("longrope", (1.5, 2.0, 2.5, 3.0), 4096)
        assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(2) / math.log(4096)))


@pytest.mark.parametrize(
    ("architecture", "changes", "rotated"),
    [
        ("PhiForCausalLM", {}, 4),
        ("PhiForCausalLM", {"partial_rotary_factor": 0.25}, 2),
        ("PhiForCausalLM", {"rope_parameters": {"partial_rotary_factor": 0.75}}, 6),
        ("PhiForCausalLM", {"partial_rotary_factor": 1.0}, None),
        ("GPTNeoXForCausalLM", {}, 2),
        ("GPTNeoXForCausalLM", {"rotary_pct": 0.5}, 4),
        ("GPTNeoXForCausalLM", {"rope_parameters": {"partial_rotary_factor": 1.0, "rope_theta": 1e4}}, None),
    ],
)
def test_the_rotated_share_of_a_head_is_read(
    tmp_path: Path, architecture: str, changes: dict[str, Any], rotated: int | None
) -> None:
    config = {**LLAMA, "architectures": [architecture]}
    assert rope_of(read(tmp_path, {**config, **changes})) == RopeSpec(10000.0, rotary_dim=rotated)
    for odd in (0.01, 0.4, 1.5):
        assert "rotated" in refusal(tmp_path, {**config, "rope_parameters": {"partial_rotary_factor": odd}})


def test_the_supported_one_of_several_architectures_is_used(tmp_path: Path) -> None:
    assert read(tmp_path, {**LLAMA, "architectures": ["Other", "LlamaForCausalLM"]}).family == "llama"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_type_decides_if_the_config_has_no_architecture(tmp_path: Path, family: str) -> None:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[FAMILIES[family].model_type]()
    config.save_pretrained(tmp_path)
    written = read_config(tmp_path)
    assert not written.get("architectures")
    assert read_spec(tmp_path).family == family
    assert read(tmp_path, {**written, "architectures": []}).family == family
    message = refusal(tmp_path, {**written, "architectures": ["Other"]}, Unsupported)
    assert "architecture Other is not supported" in message


@pytest.mark.parametrize("model_type", [None, "mamba", "gemma3"])
def test_a_config_without_architecture_and_known_model_type_is_refused(tmp_path: Path, model_type: str | None) -> None:
    """The model_type gemma3 means the multimodal model, not its text part."""
    config = {**LLAMA, "architectures": None, "model_type": model_type}
    assert "architecture unnamed is not supported" in refusal(tmp_path, config, Unsupported)


def compare(spec: ModelSpec, config: Any) -> None:
    """Check a spec against the configuration that transformers reads from the same file."""
    assert spec.hidden_size == config.hidden_size
    assert spec.num_layers == config.num_hidden_layers
    assert spec.num_heads == config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if spec.latent is None:
        assert spec.num_kv_heads == getattr(config, "num_key_value_heads", config.num_attention_heads)
        assert spec.head_dim == head_dim
    else:
        compare_latent(spec.latent, spec, config)
    assert spec.vocab_size == config.vocab_size
    assert spec.max_positions == config.max_position_embeddings
    assert spec.tie_embeddings == config.tie_word_embeddings
    eps = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    assert spec.norm.eps == next((getattr(config, name) for name in eps if hasattr(config, name)), 1e-5)
    acts = ("hidden_activation", "hidden_act", "activation_function")
    activation = next(getattr(config, name) for name in acts if hasattr(config, name))
    assert spec.activation == {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(activation, activation)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * spec.num_layers
    window = getattr(config, "sliding_window", None)
    assert windows(spec) == [window if kind == "sliding_attention" else None for kind in kinds]
    for i, kind in enumerate(kinds):
        parameters = getattr(config, "rope_parameters", None)
        parameters = parameters.get(kind, parameters) if parameters else None
        rope = spec.attention_of(i).rope if spec.latent is None else spec.latent.rope
        assert (rope is None) == (parameters is None)
        if rope is not None and parameters is not None:
            assert (rope.theta, rope.kind) == (parameters["rope_theta"], parameters["rope_type"])
            assert (rope.rotary_dim or spec.head_dim) == int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def compare_latent(latent: LatentSpec, spec: ModelSpec, config: Any) -> None:
    assert (spec.num_kv_heads, spec.head_dim) == (1, config.kv_lora_rank + config.qk_rope_head_dim)
    assert (latent.q_rank, latent.kv_rank) == (config.q_lora_rank, config.kv_lora_rank)
    assert (latent.nope_dim, latent.rope_dim) == (config.qk_nope_head_dim, config.qk_rope_head_dim)
    assert latent.value_dim == config.v_head_dim
    assert latent.interleaved == getattr(config, "rope_interleave", True)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_spec_agrees_with_the_configuration_of_transformers(checkpoint: Callable[[str], Path], name: str) -> None:
    from transformers import AutoConfig

    folder = checkpoint(name)
    spec = read_spec(folder)
    compare(spec, AutoConfig.from_pretrained(folder))
    assert spec.dtype == "float32"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_defaults_of_a_family_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """The config.json has only sizes, which have other names in gpt2."""
    from transformers import AutoConfig

    config: dict[str, Any] = {
        "hidden_size": 256,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 112,
        "vocab_size": 301,
    }
    if family == "gpt2":
        config = {"n_embd": 64, "n_head": 8, "n_layer": 3}
    model_type = {"gemma3": "gemma3_text"}.get(family, family)
    given = {**config, "model_type": model_type}
    spec = read(tmp_path, {**given, "architectures": list(FAMILIES[family].architectures)})
    compare(spec, AutoConfig.from_pretrained(tmp_path))


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "available", "prefix", "head"),
    [
        ("llama", (), "model.", "lm_head"),
        ("llama", ("embed_tokens.weight", "lm_head.weight"), "", "lm_head"),
        (
            "llama",
            ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
            "language_model.model.",
            "language_model.lm_head",
        ),
        ("llama", ("something.else",), "model.", "lm_head"),
        ("gpt2", ("wte.weight", "h.0.ln_1.weight"), "", "lm_head"),
        ("gpt2", ("transformer.wte.weight", "wte.weight"), "transformer.", "lm_head"),
        ("opt", ("decoder.embed_tokens.weight",), "decoder.", "lm_head"),
        ("gpt_neox", ("gpt_neox.embed_in.weight", "embed_out.weight"), "gpt_neox.", "embed_out"),
        ("gpt_neox", ("gpt_neox.embed_in.weight", "lm_head.weight"), "gpt_neox.", "lm_head"),
    ],
)
def test_prefix_and_head_follow_the_names_in_the_file(
    tmp_path: Path, family: str, available: tuple[str, ...], prefix: str, head: str
) -> None:
    spec = read(tmp_path, {**LLAMA, "architectures": list(FAMILIES[family].architectures)})
    names = tensor_names(spec, available)
    assert (names.prefix, names.head) == (prefix, head)


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
def test_every_spelling_of_llama3_scaling_is_read(tmp_path: Path, spelling: dict[str, Any]) -> None:
    assert rope_of(read(tmp_path, {**LLAMA, **spelling})) == RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
)
def test_every_spelling_of_linear_scaling_is_read(tmp_path: Path, spelling: dict[str, Any]) -> None:
    assert rope_of(read(tmp_path, {**LLAMA, **spelling})) == RopeSpec(10000.0, "linear", 2.0)


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
def test_every_spelling_of_a_rope_without_scaling_is_read(tmp_path: Path, spelling: dict[str, Any]) -> None:
    assert rope_of(read(tmp_path, {**LLAMA, **spelling})) == RopeSpec(1e6)


def test_yarn_scaling_is_read(tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    spec = read(tmp_path, {**LLAMA, "rope_scaling": scaling})
    usual = 0.1 * math.log(4.0) + 1.0
    assert rope_of(spec) == RopeSpec(10000.0, "yarn", 4.0, original_max_positions=128, attention_factor=usual)
    assert spec.max_positions == 512
    given = {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    assert rope_of(read(tmp_path, {**LLAMA, "rope_scaling": {**scaling, **given}})) == RopeSpec(
        10000.0, "yarn", 4.0, 1.0, 4.0, 128, 16.0, 2.0, 1.5, False
    )
    quotient = rope_of(read(tmp_path, {**LLAMA, "rope_scaling": {**scaling, "mscale": 2.0, "mscale_all_dim": 1.0}}))
    assert quotient.attention_factor == (0.2 * math.log(4.0) + 1.0) / usual
    shorter = {"rope_type": "yarn", "factor": 2.0}
    spec = read(tmp_path, {**LLAMA, "rope_parameters": shorter})
    assert (rope_of(spec).original_max_positions, spec.max_positions) == (256, 512)


@pytest.mark.parametrize("kind", ["ntk", "longrope", "7"])
def test_other_kinds_of_scaling_are_refused(tmp_path: Path, kind: object) -> None:
    message = refusal(tmp_path, {**LLAMA, "rope_scaling": {"rope_type": kind, "factor": 2.0}}, Unsupported)
    assert repr(kind) in message
    assert "supported are default, linear, llama3, yarn, dynamic, longrope" in message


def test_the_context_length_follows_the_scaling(tmp_path: Path) -> None:
    """Most factors multiply the original length if the config has it, or else the length."""

    def lengths(**scaling: Any) -> tuple[int, int | None]:
        spec = read(tmp_path, {**LLAMA, "max_position_embeddings": 4096, "rope_scaling": scaling})
        return spec.max_positions, spec.steady_positions

    assert lengths(type="linear", factor=2.5) == (10240, None)
    assert lengths(type="linear", factor=2.5, original_max_position_embeddings=1024) == (4096, None)
    assert lengths(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048) == (8192, None)
    assert lengths(**SCALING, rope_type="llama3") == (4096, None), "4096 is the length after scaling"
    grown = {**SCALING, "factor": 4.0, "original_max_position_embeddings": 4096}
    assert lengths(**grown, rope_type="llama3") == (16384, None)
    assert lengths(type="dynamic", factor=2.0) == (4096, 4096)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    assert lengths(type="longrope", **factors, original_max_position_embeddings=1024) == (4096, 1024)


@pytest.mark.parametrize("missing", ["factor", "low_freq_factor", "high_freq_factor"])
def test_an_incomplete_scaling_is_refused(tmp_path: Path, missing: str) -> None:
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
        ({"dtype": "auto", "text_config": None}, "float32"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({"dtype": "float16", "text_config": {"dtype": "bfloat16"}}, "float16"),
    ],
)
def test_every_spelling_of_the_dtype_is_read(tmp_path: Path, spelling: dict[str, Any], dtype: str) -> None:
    assert read(tmp_path, {**LLAMA, **spelling}).dtype == dtype


# --- refusals ----------------------------------------------------------------------------------------------------

SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]


@pytest.mark.parametrize("key", SIZES)
def test_a_missing_size_is_refused(tmp_path: Path, key: str) -> None:
    message = refusal(tmp_path, {k: v for k, v in LLAMA.items() if k != key})
    assert f"{key} must be a positive integer, got None" in message


def test_more_heads_than_the_hidden_size_are_refused(tmp_path: Path) -> None:
    assert "head_dim must be a positive integer, got 0" in refusal(tmp_path, {**LLAMA, "num_attention_heads": 128})


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    assert read(tmp_path, {**LLAMA, "hidden_act": "gelu"}).activation == "gelu"
    message = refusal(tmp_path, {**LLAMA, "hidden_act": "xielu"}, Unsupported)
    assert "'xielu'" in message
    assert "silu" in message


def test_unknown_or_missing_layer_types_are_refused(tmp_path: Path) -> None:
    config = {**LLAMA, "architectures": ["Gemma2ForCausalLM"]}
    message = refusal(tmp_path, {**config, "layer_types": ["full_attention", "linear_attention", "x"]}, Unsupported)
    assert "'linear_attention'" in message
    assert "3 names" in refusal(tmp_path, {**config, "layer_types": ["full_attention"]})


def test_the_error_for_an_unknown_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    message = refusal(tmp_path, {**LLAMA, "architectures": ["MambaForCausalLM"]}, Unsupported)
    assert "MambaForCausalLM" in message
    assert all(name in message for family in FAMILIES.values() for name in family.architectures)


def test_unsupported_quantized_weights_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, {**LLAMA, "quantization_config": {"quant_method": "gptq"}}, Unsupported)
    assert "weights quantized by 'gptq' can't be loaded" in message


@pytest.mark.parametrize("layers", [10_001, 2**62, 10**400], ids=["10_001", "2**62", "10**400"])
@pytest.mark.parametrize("family", FAMILIES)
def test_more_layers_than_any_model_has_are_refused(tmp_path: Path, family: str, layers: int) -> None:
    """Readers make a list with an entry for each layer, which would take forever."""
    config = {**LLAMA, "architectures": list(FAMILIES[family].architectures), "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"(num_hidden_layers|n_layer) must be at most 10000, got"):
        read_spec(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
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
_KEYS = [
    *LLAMA, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "dtype", "mlp_bias", "n_embd",
    "n_head", "sliding_window", "layer_types", "max_window_layers", "query_pre_attn_scalar", "rope_local_base_freq",
    "partial_rotary_factor", "rotary_pct", "word_embed_proj_dim", "use_sliding_window", "sliding_window_pattern",
]  # fmt: skip


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(_KEYS), _VALUES, min_size=1, max_size=3), st.sampled_from(list(FAMILIES)))
def test_random_values_are_read_or_refused(tmp_path: Path, changes: dict[str, Any], family: str) -> None:
    """Reading either returns a valid spec or raises CheckpointError."""
    config = {**LLAMA, "architectures": list(FAMILIES[family].architectures), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(CheckpointError):
        spec = read_spec(tmp_path)
        assert spec.num_heads % spec.num_kv_heads == 0
        assert min(spec.hidden_size, spec.num_layers, spec.head_dim, spec.vocab_size, spec.max_positions) >= 1


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=100) | _VALUES.map(lambda value: json.dumps(value).encode()))
def test_random_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError):
        read_spec(tmp_path)


# --- DeepSeek ----------------------------------------------------------------------------------------------------

DEEPSEEK: dict[str, Any] = {**LLAMA, "architectures": ["DeepseekV2ForCausalLM"], "n_routed_experts": 16, "n_group": 4}
DEEPSEEK |= {"topk_group": 2, "num_experts_per_tok": 4}


def experts_of(folder: Path, config: dict[str, Any]) -> MoESpec:
    moe = read(folder, config).moe
    assert moe is not None
    return moe


def test_the_routing_of_deepseek_is_read(tmp_path: Path) -> None:
    plain = experts_of(tmp_path, DEEPSEEK).routing
    assert (plain.groups, plain.scoring, plain.normalize, plain.correction_bias) == (1, "softmax", False, False)
    grouped = experts_of(tmp_path, {**DEEPSEEK, "topk_method": "group_limited_greedy"}).routing
    assert (grouped.groups, grouped.top_groups, grouped.group_score) == (4, 2, "best")
    third = {**DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "scoring_func": "sigmoid"}
    biased = experts_of(tmp_path, third).routing
    assert (biased.scoring, biased.normalize, biased.correction_bias) == ("sigmoid", True, True)
    assert (biased.group_score, biased.scale) == ("best_two", 2.5)
    for config, changes, word in (
        (DEEPSEEK, {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        (DEEPSEEK, {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        (DEEPSEEK, {"norm_topk_prob": True}, "norm_topk_prob"),
        (third, {"topk_method": "greedy"}, "topk_method 'greedy'"),
        (third, {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    ):
        assert word in refusal(tmp_path, {**config, **changes}, Unsupported)


def test_the_layers_with_experts_of_deepseek_are_read(tmp_path: Path) -> None:
    config = {**DEEPSEEK, "num_hidden_layers": 7, "first_k_dense_replace": 3, "moe_layer_freq": 2}
    assert experts_of(tmp_path, config).layers == (False, False, False, False, True, False, True)
    assert experts_of(tmp_path, {**config, "n_shared_experts": 3, "moe_intermediate_size": 40}).shared_size == 120
    assert experts_of(tmp_path, {**config, "n_shared_experts": 0}).shared_size == 0


def test_the_attention_scale_of_deepseek_includes_yarn(tmp_path: Path) -> None:
    """With the configuration of V2-Lite, YaRN scales the attention scores instead of cos and sin."""
    scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    sharpened = read(tmp_path, {**DEEPSEEK, "rope_scaling": {**scaling, "mscale": 0.707, "mscale_all_dim": 0.707}})
    assert sharpened.latent is not None
    assert sharpened.latent.rope.attention_factor == 1.0
    assert sharpened.attention_of(0).scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)
    assert sharpened.max_positions == 40 * 4096
    assert read(tmp_path, {**DEEPSEEK, "rope_scaling": scaling}).attention_of(0).scale == pytest.approx(192**-0.5)
    assert read(tmp_path, DEEPSEEK).attention_of(0).scale == pytest.approx(192**-0.5)


def test_the_queries_of_deepseek_may_have_no_latent(tmp_path: Path) -> None:
    assert read(tmp_path, DEEPSEEK).latent == read(tmp_path, {**DEEPSEEK, "q_lora_rank": 1536}).latent
    straight = read(tmp_path, {**DEEPSEEK, "q_lora_rank": None}).latent
    assert straight is not None
    assert straight.q_rank is None


@pytest.mark.parametrize(
    "changes", [{"text_config": 7}, {"architectures": [["x"]]}, {"text_config": {"model_type": [1]}}]
)
def test_malformed_text_parts_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    refusal(
        tmp_path, {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": 0}, **changes}
    )
