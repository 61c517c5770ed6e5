"""Engines with real ranks that sleep and wake up give the same tokens, and really free their memory."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conformance.test_greedy_tokens import make_prompts
from shoal import LLM, SamplingParams
from shoal.errors import CheckpointError, ConfigError, RequestError
from shoal.wire.ranks import RankStats

pytestmark = pytest.mark.slow  # starts processes

Checkpoint = Callable[[str], Path]

PROMPTS: list[Any] = [{"prompt_token_ids": tokens} for tokens in make_prompts([1, 9, 17, 33, 26], seed=4)]
PARAMS = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=6, ignore_eos=True)
SIZE: dict[str, Any] = {"kv_cache_memory_bytes": "1MiB", "max_model_len": 96, "max_num_seqs": 6}
THREADS = {"distributed_executor_backend": "threads"}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("llama", {}),
    "pp2-threads": ("llama", {"pipeline_parallel_size": 2, **THREADS}),
    "tp2-dp2-threads": ("llama", {"tensor_parallel_size": 2, "data_parallel_size": 2, **THREADS}),
    "ep-threads": ("mixtral", {"data_parallel_size": 2, "enable_expert_parallel": True, **THREADS}),
    "engine-process": ("llama", {"engine_process": True}),
}
MIB = 1 << 20


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def folder(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(checkpoint("llama"), tmp_path_factory.mktemp("copy") / "model")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[LLM]:
    """An engine with two ranks in processes, awake before and after each test."""
    with LLM(folder, **SIZE, tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        yield llm


@pytest.mark.parametrize(("model", "layout"), LAYOUTS.values(), ids=list(LAYOUTS))
def test_tokens_are_the_same_after_a_sleep(checkpoint: Checkpoint, model: str, layout: dict[str, Any]) -> None:
    with LLM(checkpoint(model), **SIZE, **layout) as llm:
        sleep_and_compare(llm)


def test_tokens_of_ranks_in_processes_are_the_same_after_a_sleep(pair: LLM) -> None:
    sleep_and_compare(pair)


def sleep_and_compare(llm: LLM) -> None:
    before = tokens(llm)
    busy = sum(rank.busy_us for rank in llm.stats().ranks)
    llm.sleep(level=1)
    assert llm.is_sleeping()
    assert all(rank.weight_bytes == rank.kv_bytes == 0 for rank in llm.stats().ranks)
    with pytest.raises(RequestError, match=r"call wake_up\(\)"):
        tokens(llm)
    llm.wake_up()
    assert tokens(llm) == before
    llm.sleep(level=2)
    llm.wake_up(tags=["kv_cache"])
    assert llm.is_sleeping()
    llm.wake_up(tags=["weights"])
    assert not llm.is_sleeping()
    assert tokens(llm) == before
    stats = llm.stats()
    assert stats.free_blocks == stats.num_blocks
    assert sum(rank.busy_us for rank in stats.ranks) > busy, "counters continue"


def test_a_draft_model_sleeps_and_wakes_up(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    speculative = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    with LLM(folder, **SIZE, speculative_config=speculative) as llm:
        before = tokens(llm)
        llm.sleep()
        assert llm.stats().ranks[0].weight_bytes == 0
        llm.wake_up()
        assert tokens(llm) == before
        assert llm.stats().accepted_tokens > 0


def test_a_prefix_is_computed_again_after_a_reset(checkpoint: Checkpoint) -> None:
    prompt: list[Any] = [{"prompt_token_ids": [7] * 48}]

    def cached(llm: LLM) -> int | None:
        return llm.generate(prompt, PARAMS, use_tqdm=False)[0].num_cached_tokens

    with LLM(checkpoint("llama"), **SIZE, data_parallel_size=2, **THREADS) as llm:
        for _ in range(4):
            cached(llm)
        assert cached(llm)
        assert llm.reset_prefix_cache()
        assert cached(llm) == 0


# --- files -------------------------------------------------------------------------------------------------------


def test_an_engine_stays_asleep_until_its_weights_are_back(folder: Path) -> None:
    with LLM(folder, **SIZE, tensor_parallel_size=2, **THREADS) as llm:
        sleep_without_weights(llm, folder)


def test_ranks_in_processes_stay_asleep_until_their_weights_are_back(pair: LLM, folder: Path) -> None:
    sleep_without_weights(pair, folder)


def sleep_without_weights(llm: LLM, folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    before = tokens(llm)
    llm.sleep()
    file.rename(folder / "away")
    with pytest.raises(CheckpointError, match="has no weights"):
        llm.wake_up()
    shutil.copy(folder / "away", file)
    with pytest.raises(CheckpointError, match="has changed since Shoal first read it"):
        llm.wake_up(tags=["weights"])
    assert llm.is_sleeping()
    (folder / "away").rename(file)
    llm.wake_up()
    assert tokens(llm) == before


def test_a_rank_that_dies_asleep_is_replaced_by_a_sleeping_one(pair: LLM) -> None:
    pair.sleep()
    loads = [rank.loads for rank in ranks(pair)]
    assert min(loads) > 0
    os.kill(ranks(pair)[1].pid, signal.SIGKILL)
    pair.wake_up(["kv_cache"])
    found = ranks(pair)
    assert [rank.weight_bytes for rank in found] == [0, 0]
    assert [rank.loads for rank in found] == [loads[0], 0]
    pair.wake_up()
    assert [rank.loads for rank in ranks(pair)] == [loads[0] + 1, 1]


def test_invalid_calls_are_refused(checkpoint: Checkpoint) -> None:
    with LLM(checkpoint("llama"), **SIZE) as llm:
        with pytest.raises(ConfigError, match="0, 1 or 2"):
            llm.sleep(level=3)
        with pytest.raises(ConfigError, match="tags may be"):
            llm.wake_up(tags=["lungs"])
        longer = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        runs = llm.run([llm.prepare(i, prompt, longer if i else PARAMS) for i, prompt in enumerate(PROMPTS)])
        next(runs)
        with pytest.raises(RequestError, match="are not finished"):
            llm.sleep()
        assert len(list(runs)) == len(PROMPTS) - 1
        llm.sleep()


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A model whose vocabulary takes much memory but little time."""
    folder = tmp_path_factory.mktemp("large")
    config = json.loads((checkpoint("llama") / "config.json").read_text())
    sizes = {"vocab_size": 100_000, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    with LLM(
        folder, load_format="dummy", tensor_parallel_size=2, kv_cache_memory_bytes="8MiB", max_model_len=96
    ) as llm:
        yield llm


def fill(llm: LLM) -> None:
    """Fill the whole KV cache."""
    stats = llm.stats()
    longest = stats.max_model_len - 1
    count = stats.num_blocks * stats.block_size // longest
    prompts: list[Any] = [{"prompt_token_ids": [3 + i] * longest} for i in range(count)]
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)


def ranks(llm: LLM) -> tuple[RankStats, ...]:
    return llm.stats().ranks


def test_sleep_frees_weights_and_cache_and_ten_rounds_leak_nothing(large: LLM) -> None:
    """A sleeping rank must have freed nine tenths of its weights and cache.

    The rest is left to allocators, which free a chunk only when nothing in it is used.
    """
    fill(large)
    awake = ranks(large)
    held = [rank.weight_bytes + rank.kv_bytes for rank in awake]
    assert min(held) > 20 * MIB, "enough to be noticed beside the memory of Python and PyTorch"
    asleep, again = [], []
    for round_ in range(10):
        large.sleep()
        asleep.append(ranks(large))
        large.wake_up()
        if round_ in (1, 9):
            again.append(ranks(large))  # before its steps' working memory, which differs from time to time
            fill(large)
    for i, bytes_ in enumerate(held):
        assert all(found[i].anonymous < awake[i].anonymous - 0.9 * bytes_ for found in asleep)
        for found in (asleep[1:], again):
            assert found[-1][i].anonymous < found[0][i].anonymous + 0.1 * bytes_
