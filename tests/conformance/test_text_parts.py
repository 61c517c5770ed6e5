"""Tests of models with image input that are served as text models: they give transformers' tokens for texts."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conformance.test_greedy_tokens import LOGPROB_TOLERANCE, generate, make_prompts
from shoal import RequestOutput
from support.checkpoints import SIZES, save_model
from support.plans import planner_of

pytestmark = pytest.mark.slow

PROMPTS = make_prompts([5, 40], seed=8)
STEPS = 8
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
TEXT = {key: value for key, value in SIZES.items() if value is not None}
SAVED, PUBLISHED = "model.language_model.", "language_model.model."


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text: dict[str, Any] = {
        **TEXT,
        "head_dim": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "num_hidden_layers": 4,
    }
    text |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    vision = {"model_type": "siglip_vision_model", **VISION}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}
    text = {**TEXT, "model_type": "llama"}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=300))


def mistral3() -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {"model_type": "pixtral", "head_dim": 16, **VISION}
    text = {**TEXT, "model_type": "mistral", "head_dim": 8}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=300, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config)


def published(folder: Path) -> None:
    """Rename tensors from transformers' names in memory to their names on the hub."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace(SAVED, PUBLISHED): tensor for name, tensor in tensors.items()}
    if "lm_head.weight" in renamed:
        renamed["language_model.lm_head.weight"] = renamed.pop("lm_head.weight")
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


@lru_cache
def whole(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    plain = {"attn_implementation": "eager"}
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **plain).eval()


@torch.inference_mode()
def assert_same(folder: Path, outputs: list[RequestOutput]) -> None:
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (found,) = output.outputs
        tokens = [*prompt, *found.token_ids]
        rows = whole(folder)(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)[len(prompt) - 1 :]
        assert found.logprobs is not None
        for token, row, entries in zip(found.token_ids, rows, found.logprobs, strict=False):
            assert float(row.max() - row[token]) < 1e-3
            assert all(abs(each.logprob - float(row[id_])) < LOGPROB_TOLERANCE for id_, each in entries.items())


@pytest.mark.parametrize("names", ["saved", "published"])
@pytest.mark.parametrize("make", [gemma3, llava, mistral3])
def test_a_text(tmp_path: Path, make: Callable[[], Any], names: str) -> None:
    folder = save_model(make, tmp_path / "model")
    if names == "published":
        published(folder)
    layouts: list[dict[str, Any]] = [{"tensor_parallel_size": 3}, {"pipeline_parallel_size": 2}]
    for options in (*layouts, {"model_impl": "transformers", "tensor_parallel_size": 2}):
        assert_same(folder, generate(folder, PROMPTS, STEPS, **options))


def test_a_short_text_config_gets_transformers_defaults(tmp_path: Path) -> None:
    """The config.json of google/gemma-3-4b-it leaves most fields out."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    planner = planner_of(tmp_path, load_format="dummy", kv_cache_memory_bytes=2**30)
    reasons = planner.first_plan.reasons
    assert "only the text part of Gemma3ForConditionalGeneration is served; it reads no images" in reasons
    spec = planner.model.spec
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert (spec.tie_embeddings, spec.dtype, spec.max_positions) == (True, "bfloat16", 131072)
