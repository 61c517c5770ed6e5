"""Tests of latent attention in every way in which a sequence can be computed, and of DeepSeek's own files."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conformance.test_greedy_tokens import assert_same, generate, make_prompts, run
from shoal import LLM, SamplingParams
from shoal.models.kv_format import KV_FORMATS
from shoal.models.manifest import kv_block_bytes, make_shards
from shoal.models.registry import read_spec
from shoal.worker.kv_cache import allocate

pytestmark = pytest.mark.slow

Checkpoint = Callable[[str], Path]
NAMES = ["deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "deepseek_v3_halves"]
PROMPTS = make_prompts([1, 9, 40], seed=31)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_budget_smaller_than_a_prompt(checkpoint: Checkpoint, name: str) -> None:
    """test_matrix.py has other numbers of ranks."""
    folder = checkpoint(name)
    outputs = generate(folder, PROMPTS, steps=8, tensor_parallel_size=2, max_num_batched_tokens=7)
    assert_same(folder, PROMPTS, outputs)


@pytest.mark.parametrize("shares", [None, (1, 3, 2, 1), (9, 1, 1, 1)])
def test_six_heads_over_four_ranks(checkpoint: Checkpoint, shares: Sequence[int] | None) -> None:
    """Some ranks have two heads; a rank without heads has no cache."""
    folder = checkpoint("deepseek_v2_lite")
    outputs = generate(folder, PROMPTS, steps=8, tensor_parallel_size=4, tensor_parallel_split=shares)
    assert_same(folder, PROMPTS, outputs)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_prefix_hits(checkpoint: Checkpoint, tp: int) -> None:
    folder = checkpoint("deepseek_v3")
    common = make_prompts([48], seed=5)[0]
    prompts = [common + prompt for prompt in make_prompts([1, 17], seed=7)] + [common]
    backend = "uni" if tp == 1 else "threads"
    options: Any = {"tensor_parallel_size": tp, "distributed_executor_backend": backend, "block_size": 16}
    with LLM(str(folder), kv_cache_memory_bytes=2**21, **options) as llm:
        assert_same(folder, [common], run(llm, [common], 4))
        outputs = run(llm, prompts, 8)
    assert_same(folder, prompts, outputs)
    assert [output.num_cached_tokens for output in outputs] == [48, 48, 47]


@pytest.mark.slow
def test_guesses(checkpoint: Checkpoint) -> None:
    folder = checkpoint("deepseek_v2")
    prompts = [[5, 6, 7, 8] * 6, *PROMPTS]
    guessing = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    assert_same(folder, prompts, generate(folder, prompts, steps=12, speculative_config=guessing))


@pytest.mark.slow
def test_a_seeded_request_draws_the_same_alone_and_in_a_batch(checkpoint: Checkpoint) -> None:
    """Even the bits of the log-probabilities are equal, in spite of latent attention's products per head."""
    folder = checkpoint("deepseek_v2")
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in make_prompts([5 + i for i in range(12)], seed=8)]
    params = [SamplingParams(seed=i, max_tokens=12, ignore_eos=True, logprobs=0) for i in range(12)]
    options: Any = {"distributed_executor_backend": "uni", "kv_cache_memory_bytes": 2**21}
    with LLM(str(folder), enable_prefix_caching=False, **options) as llm:
        batch = llm.generate(prompts, params, use_tqdm=False)
        for i in range(0, 12, 4):
            alone = llm.generate(prompts[i], params[i], use_tqdm=False)[0].outputs[0]
            assert alone.token_ids == batch[i].outputs[0].token_ids
            assert alone.cumulative_logprob == batch[i].outputs[0].cumulative_logprob


@pytest.mark.slow
def test_weights_that_predict_further_tokens_are_not_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """They are in an additional layer after the last one, as in models on the hub."""
    folder = checkpoint("deepseek_v3")
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    behind = f"model.layers.{config['num_hidden_layers']}."
    further = {name.replace(last, behind): tensor + 1 for name, tensor in tensors.items() if name.startswith(last)}
    further |= {f"{behind}{name}.weight": torch.ones(64) for name in ("enorm", "hnorm", "shared_head.norm")}
    further |= {f"{behind}eh_proj.weight": torch.ones(64, 128), f"{behind}embed_tokens.weight": torch.ones(301, 64)}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    save_file({**tensors, **further}, tmp_path / "model.safetensors")
    assert_same(folder, PROMPTS, generate(tmp_path, PROMPTS, steps=8))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_token_takes_its_latent_and_one_key_on_each_rank(checkpoint: Checkpoint, tp: int) -> None:
    spec = read_spec(checkpoint("deepseek_v3"))
    for shard in make_shards(spec, tp):
        assert kv_block_bytes(spec, shard, 16, KV_FORMATS["bfloat16"]) == 3 * 16 * (32 + 8) * 2
        memory = allocate(spec, shard, 5, 16, "bfloat16", torch.device("cpu"))
        assert len(memory.pool) == 3 * (5 * 16 + 1) * (32 + 8) * 2
        assert all(layer.keys is layer.values for layer in memory.layers)
        assert memory.layers[0].keys.shape == (5 * 16 + 1, 1, 32 + 8)
        assert len({layer.keys.data_ptr() for layer in memory.layers}) == 3


@pytest.mark.parametrize("tp", [1, 2])
def test_blocks_of_a_budget(checkpoint: Checkpoint, tp: int) -> None:
    """Two ranks have as many blocks as one, since each holds the whole cache."""
    options: Any = {"tensor_parallel_size": tp, "distributed_executor_backend": "uni" if tp == 1 else "threads"}
    with LLM(str(checkpoint("deepseek_v2")), kv_cache_memory_bytes=3 * 16 * 40 * 4 * 21 + 5, **options) as llm:
        run(llm, PROMPTS[:1], 1)
        assert llm.stats().num_blocks == 21


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3_halves"])
def test_pipeline_stages(checkpoint: Checkpoint, name: str) -> None:
    folder = checkpoint(name)
    options: Any = {"pipeline_parallel_size": 3, "tensor_parallel_size": 2, "distributed_executor_backend": "threads"}
    assert_same(folder, PROMPTS, generate(folder, PROMPTS, steps=8, **options))


def test_bfloat16_stays_near_float32(checkpoint: Checkpoint) -> None:
    folder = checkpoint("deepseek_v2_lite")
    (whole,), (half,) = (generate(folder, PROMPTS[1:2], steps=1, dtype=dtype) for dtype in ("float32", "bfloat16"))
    found = [output.outputs[0].logprobs for output in (whole, half)]
    assert found[0] is not None
    assert found[1] is not None
    token = whole.outputs[0].token_ids[0]
    assert abs(found[0][0][token].logprob - found[1][0][token].logprob) < 0.5
