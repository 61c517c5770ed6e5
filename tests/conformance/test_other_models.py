"""Tests of models without a family here: they run as transformers' own modules, and give the same tokens."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conformance.test_greedy_tokens import MIXED, Checkpoint, assert_same, generate
from shoal import LLM
from shoal.errors import ConfigError
from support import other_models

pytestmark = pytest.mark.slow

STEPS = 12
SMALL: Any = {"kv_cache_memory_bytes": 2**20}
Other = Callable[[str], Path]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Other:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = other_models.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(other_models.ALONE), "Granite", "Olmo2"])
def test_one_rank(other: Other, name: str) -> None:
    """test_pipeline.py has all models with one rank in each of three stages."""
    folder = other(name)
    assert_same(folder, MIXED, generate(folder, MIXED, STEPS, max_num_batched_tokens=64))


@pytest.mark.parametrize("name", sorted(other_models.CUT | other_models.WHOLE_ATTENTION))
def test_thread_ranks(other: Other, name: str) -> None:
    """Three ranks, which divide neither heads nor columns."""
    folder = other(name)
    assert_same(folder, MIXED, generate(folder, MIXED, STEPS, tensor_parallel_size=3))


def test_the_log_names_the_implementation(other: Other, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("shoal").setLevel(logging.INFO)
    folders = {name: other(name) for name in ("Granite", "StableLm")}
    with LLM(str(folders["Granite"]), tensor_parallel_size=2, distributed_executor_backend="threads", **SMALL):
        assert (
            "GraniteForCausalLM runs as transformers' module with our attention and KV cache, 21 linear layers"
            in caplog.text
        )
    with LLM(str(folders["StableLm"]), **SMALL):
        assert "on one rank: it publishes no tensor-parallel plan" in caplog.text
    with pytest.raises(ConfigError, match="StableLmForCausalLM can run through transformers on one rank only"):
        LLM(str(folders["StableLm"]), tensor_parallel_size=2, **SMALL)


def test_process_ranks(other: Other) -> None:
    """Each process imports transformers and makes its part of the module from the plan that it is sent."""
    folder = other("Granite")
    outputs = generate(folder, MIXED, STEPS, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert_same(folder, MIXED, outputs)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [5, 9])
def test_more_ranks_than_kv_heads_and_than_heads(other: Other, tp: int) -> None:
    """With 9 ranks the last one holds no head, but the module computes one anyway."""
    folder = other("Granite")
    assert_same(folder, MIXED[:4], generate(folder, MIXED[:4], 6, tensor_parallel_size=tp))


def test_unequal_shares(other: Other) -> None:
    folder = other("Granite")
    outputs = generate(folder, MIXED, STEPS, tensor_parallel_size=3, tensor_parallel_split=(2, 1, 1))
    assert_same(folder, MIXED, outputs)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_transformers_module_gives_the_tokens_of_our_own_family(checkpoint: Checkpoint, name: str, tp: int) -> None:
    folder = checkpoint(name)
    forced = generate(folder, MIXED, STEPS, tensor_parallel_size=tp, model_impl="transformers")
    assert_same(folder, MIXED, forced)
    own = generate(folder, MIXED, STEPS, tensor_parallel_size=tp, model_impl="shoal")
    assert [each.outputs[0].token_ids for each in forced] == [each.outputs[0].token_ids for each in own]


@pytest.mark.slow
def test_tokens_do_not_depend_on_the_batch(other: Other) -> None:
    folder = other("Olmo2")
    together = generate(folder, MIXED, STEPS)
    for prompt, output in list(zip(MIXED, together, strict=True))[::3]:
        (alone,) = generate(folder, [prompt], STEPS)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["Granite", "Olmo2", "StableLm"])
def test_cuda(other: Other, name: str) -> None:
    folder = other(name)
    assert_same(folder, MIXED, generate(folder, MIXED, STEPS, device="cuda"))
