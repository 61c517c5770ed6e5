"""Tests of tied heads that are stored with other values than the embedding: they are not tied, as in transformers.

Also tests of the type of weights if config.json does not name it.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.test_greedy_tokens import assert_same, generate, make_prompts, reference, run
from shoal import LLM
from shoal.planner.planner import Planner
from support import other_models
from support.plans import planner_of

pytestmark = pytest.mark.slow

Checkpoint = Callable[[str], Path]

PROMPTS = make_prompts([1, 40], seed=5)
STEPS = 8
SMALL: Any = {"kv_cache_memory_bytes": 2**20, "distributed_executor_backend": "uni"}
EMBEDDINGS = {"gpt2": "transformer.wte.weight", "opt": "model.decoder.embed_tokens.weight"}
TIED = [
    "gemma2",
    "gpt2",
    "granitemoe",
    "llama3",
    "opt_350m",
    "qwen3",
]  # three of them are tied by their family's default


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """Copy the checkpoint with other tensors, and with these fields of config.json; None removes a field."""
    target.mkdir(parents=True)
    said = {**json.loads((source / "config.json").read_text()), **config}
    kept = {key: value for key, value in said.items() if value is not None or key not in config}
    (target / "config.json").write_text(json.dumps(kept))
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def embedding_of(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))


def with_head(tensors: dict[str, Tensor]) -> None:
    embedding = tensors[embedding_of(tensors)]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(3))
    tensors["lm_head.weight"] = embedding.clone() + 0.1 * noise


def with_equal_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors[embedding_of(tensors)].clone()


def with_head_only(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop(embedding_of(tensors))


def planned(folder: Path, **options: Any) -> Planner:
    return planner_of(folder, kv_cache_memory_bytes=2**20, **options)


@contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logging.getLogger("shoal").setLevel(logging.INFO)
    caplog.clear()
    yield caplog


@pytest.fixture
def llama3(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return changed(checkpoint("llama3"), tmp_path / "llama3", with_head)


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED)
def test_the_stored_head_is_used(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    source = checkpoint(name)
    silent = {"tie_word_embeddings": None} if name in ("gemma2", "gpt2", "opt_350m") else {}
    folder = changed(source, tmp_path / "model", with_head, **silent)
    outputs = generate(folder, PROMPTS, STEPS)
    assert_same(folder, PROMPTS, outputs)
    _, tied = reference(source, tuple(PROMPTS[1]), 1)
    _, stored = reference(folder, tuple(PROMPTS[1]), 1)
    assert float((tied - stored).abs().max()) > 0.01, "else this test could not fail"


@pytest.mark.parametrize(
    "layout",
    [{"tensor_parallel_size": 3}, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}],
)
@pytest.mark.parametrize("model_impl", ["shoal", "transformers"])
def test_layouts(llama3: Path, layout: dict[str, int], model_impl: str) -> None:
    assert_same(llama3, PROMPTS, generate(llama3, PROMPTS, STEPS, model_impl=model_impl, **layout))


def test_process_ranks(llama3: Path) -> None:
    options: Any = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    assert_same(llama3, PROMPTS, generate(llama3, PROMPTS, STEPS, **options))


def test_a_model_that_no_family_reads(tmp_path: Path) -> None:
    folder = changed(
        other_models.save("Granite", tmp_path / "saved"), tmp_path / "model", with_head, tie_word_embeddings=True
    )
    assert_same(folder, PROMPTS, generate(folder, PROMPTS, STEPS, tensor_parallel_size=2))


def test_the_log_mentions_it_once(llama3: Path, checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    said = "lm_head.weight is stored and is not model.embed_tokens.weight: the stored head is used"
    with logged(caplog), LLM(str(llama3), **SMALL):
        assert caplog.text.count(said) == 1
    with logged(caplog), LLM(str(checkpoint("llama3")), **SMALL):
        assert said not in caplog.text


def test_files_of_torch_save(llama3: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Both names have the same storage in these files, so the tensors are not compared."""
    for source, differs in ((llama3, True), (checkpoint("llama3"), False)):
        folder = tmp_path / f"differs-{differs}"
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        tensors = load_file(source / "model.safetensors")
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
        torch.save(tensors, folder / "pytorch_model.bin")
        with LLM(str(folder), **SMALL) as llm:
            assert_same(folder, PROMPTS, run(llm, PROMPTS, STEPS))
        assert planned(folder).model.spec.tie_embeddings is not differs


@pytest.mark.slow
def test_an_equal_head_stays_tied(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """It takes no additional memory."""
    source = checkpoint("llama3")
    folder = changed(source, tmp_path / "model", with_equal_head)
    assert planned(folder).model.spec.tie_embeddings
    assert planned(folder).first_plan.ranks == planned(source).first_plan.ranks
    assert_same(folder, PROMPTS, generate(folder, PROMPTS, STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("model_impl", ["shoal", "transformers"])
@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_only_the_head_is_stored(checkpoint: Checkpoint, tmp_path: Path, name: str, model_impl: str) -> None:
    folder = changed(checkpoint(name), tmp_path / "model", with_head_only)
    outputs = generate(folder, PROMPTS, STEPS, pipeline_parallel_size=2, model_impl=model_impl)
    assert_same(folder, PROMPTS, outputs)


@pytest.mark.slow
def test_a_draft_model(llama3: Path, checkpoint: Checkpoint) -> None:
    """The model itself as draft model is always right, so both have read the same head."""
    speculative = {"model": str(llama3), "num_speculative_tokens": 3}
    with LLM(str(llama3), speculative_config=speculative, **SMALL) as llm:
        assert_same(llama3, PROMPTS, run(llm, PROMPTS, STEPS))
        stats = llm.stats()
        assert stats.accepted_tokens == stats.draft_tokens > 0


@pytest.mark.parametrize("model_impl", ["shoal", "transformers"])
def test_tensors_that_are_not_needed(checkpoint: Checkpoint, tmp_path: Path, model_impl: str) -> None:
    """They are layers that predict further tokens, image towers and rotary tables, in types that are not supported."""

    def more(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)
        tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(5, 5)
        tensors["model.mtp.layers.0.embed_tokens.weight"] = torch.ones(5, 5, dtype=torch.float8_e5m2)
        tensors["vision_tower.patch.weight"] = torch.ones(2, 3, 4, 5, dtype=torch.float16)
        tensors["model.position_ids"] = torch.arange(9)

    folder = changed(checkpoint("llama"), tmp_path / "model", more)
    outputs = generate(folder, PROMPTS, STEPS, tensor_parallel_size=2, model_impl=model_impl)
    assert_same(checkpoint("llama"), PROMPTS, outputs)


# --- types -----------------------------------------------------------------------------------------------------------


def in_type(dtype: torch.dtype, but: str = "\0") -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor if name.endswith(but) else tensor.to(dtype)

    return change


@pytest.mark.parametrize("said", [{"dtype": None, "torch_dtype": None}, {"dtype": "auto"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model_impl", ["shoal", "transformers"])
def test_the_type_is_that_of_the_weights(
    checkpoint: Checkpoint, tmp_path: Path, dtype: torch.dtype, said: dict[str, Any], model_impl: str
) -> None:
    """The type with the most bytes counts, since norms often have a wider type."""
    folder = changed(checkpoint("llama"), tmp_path / "model", in_type(dtype, "norm.weight"), **said)
    found = planned(folder, model_impl=model_impl).first_plan
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert planned(folder, dtype="float32").first_plan.dtype == "float32"
    with LLM(str(folder), model_impl=model_impl, **SMALL) as llm:
        run(llm, PROMPTS, 2)


def test_a_nested_type(checkpoint: Checkpoint, tmp_path: Path) -> None:
    nested = {"dtype": None, "text_config": {"torch_dtype": "float16"}}
    folder = changed(checkpoint("llama"), tmp_path / "model", in_type(torch.bfloat16), **nested)
    assert planned(folder).first_plan.dtype == "float16"
