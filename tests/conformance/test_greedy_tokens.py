"""Tests that every layout gives transformers' greedy tokens in float32, except for near-ties."""

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import LLM, RequestOutput, SamplingParams
from support.checkpoints import MAKERS, Reference

pytestmark = pytest.mark.slow

# Two tokens whose log-probabilities in the reference differ by less than this may change their order.
NEAR_TIE = 1e-3
# float32 sums in another order: 3 layers of width 64 differ by less than 3e-5 here; 1e-4 leaves room for more ranks.
LOGPROB_TOLERANCE = 1e-4
STEPS = 24

Checkpoint = Callable[[str], Path]


def make_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 250) for _ in range(length)] for length in lengths]


MIXED = make_prompts([1, 2, 3, 15, 16, 17, 40, 90])
FEW = make_prompts([1, 9, 40])  # shorter and longer than the checkpoints' windows


@lru_cache
def reference(folder: Path, prompt: tuple[int, ...], steps: int) -> tuple[list[int], torch.Tensor]:
    return Reference(folder).greedy(prompt, steps)


def generate(folder: Path, prompts: Sequence[Sequence[int]], steps: int = STEPS, **options: Any) -> list[RequestOutput]:
    sizes = (options.get(f"{axis}_parallel_size", 1) for axis in ("tensor", "pipeline", "data"))
    backend = "uni" if math.prod(sizes) == 1 else "threads"
    with LLM(
        str(folder), **{"distributed_executor_backend": backend, "kv_cache_memory_bytes": 2**21, **options}
    ) as llm:
        return run(llm, prompts, steps)


def run(llm: LLM, prompts: Sequence[Sequence[int]], steps: int = STEPS) -> list[RequestOutput]:
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, logprobs=3)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


@lru_cache(maxsize=1024)
def rows_of(folder: Path, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    return Reference(folder).logprobs_of(prompt, tokens)


def assert_same(folder: Path, prompts: Sequence[Sequence[int]], outputs: Sequence[RequestOutput]) -> None:
    """Check that the tokens are the reference's greedy continuation: each is its choice after the tokens before it."""
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = tuple(output.outputs[0].token_ids)
        rows = rows_of(folder, tuple(prompt), tokens)
        found = output.outputs[0].logprobs
        assert found is not None
        for i, (row, token, ours) in enumerate(zip(rows, tokens, found, strict=True)):
            best = int(row.argmax())
            close = float(row[best] - row[token])
            assert token == best or close < NEAR_TIE, f"prompt of {len(prompt)}: token {i} is {token}, not {best}"
            for token_id, value in ours.items():
                assert abs(value.logprob - float(row[token_id])) < LOGPROB_TOLERANCE
            assert token in ours


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp"), [("llama", 1), ("llama", 4), ("llama_6_2", 4), ("gemma3", 3), ("opt_350m", 3)])
def test_many_prompts(checkpoint: Checkpoint, name: str, tp: int) -> None:
    """Prefills and decodes share steps, and some prompts end at the end of a block.

    test_matrix.py has every family in many layouts, models/test_decoder.py every family on one rank.
    """
    folder = checkpoint(name)
    assert_same(folder, MIXED, generate(folder, MIXED, tensor_parallel_size=tp))


def test_process_ranks(checkpoint: Checkpoint) -> None:
    """test_matrix.py has other families and more layouts."""
    folder = checkpoint("phi")
    outputs = generate(folder, FEW, steps=8, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert_same(folder, FEW, outputs)


@pytest.mark.parametrize("shares", [(2, 1), (1, 3, 2), (1, 20)])
@pytest.mark.parametrize("name", ["llama_6_2", "gpt2", "phi_qk_norm"])
def test_unequal_shares(checkpoint: Checkpoint, name: str, shares: tuple[int, ...]) -> None:
    folder = checkpoint(name)
    outputs = generate(folder, FEW, steps=8, tensor_parallel_size=len(shares), tensor_parallel_split=shares)
    assert_same(folder, FEW, outputs)


def test_engine_in_a_process_of_its_own(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    assert_same(folder, MIXED, generate(folder, MIXED, engine_process=True))


@pytest.mark.parametrize("tp", [7, 9])
def test_more_ranks_than_heads(checkpoint: Checkpoint, tp: int) -> None:
    """Ranks without query heads contribute zeros to the sums."""
    folder = checkpoint("llama_6_2")
    assert_same(folder, MIXED[:5], generate(folder, MIXED[:5], steps=8, tensor_parallel_size=tp))


@pytest.mark.parametrize(("tp", "depth"), [(1, 1), (3, 2), (1, 3)])
def test_budget_smaller_than_a_prompt(checkpoint: Checkpoint, depth: int, tp: int) -> None:
    folder = checkpoint("llama")
    outputs = generate(folder, MIXED, tensor_parallel_size=tp, max_num_batched_tokens=7, max_in_flight=depth)
    assert_same(folder, MIXED, outputs)


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_prefix_hits(checkpoint: Checkpoint, block_size: int) -> None:
    folder = checkpoint("qwen3")
    common = make_prompts([48], seed=5)[0]
    first = [common + prompt for prompt in make_prompts([2, 9], seed=6)]
    second = [common + prompt for prompt in make_prompts([1, 17, 30], seed=7)] + [common]
    options: Any = {"distributed_executor_backend": "uni", "kv_cache_memory_bytes": 2**21, "block_size": block_size}
    with LLM(str(folder), **options) as llm:
        assert_same(folder, first, run(llm, first))
        outputs = run(llm, second)
    assert_same(folder, second, outputs)
    whole = 48 // block_size * block_size
    last = min(whole, 47)  # the last token of a prompt is always computed
    assert [output.num_cached_tokens for output in outputs] == [whole, whole, whole, last]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "depth"), [(2, 1), (1, 2), (2, 3)])
def test_preemption(checkpoint: Checkpoint, depth: int, tp: int) -> None:
    """The cache holds one request of the longest length: the others are preempted and computed again."""
    folder = checkpoint("llama")
    prompts = make_prompts([20, 30, 25, 33, 8, 14], seed=3)
    options: dict[str, Any] = {"tensor_parallel_size": tp, "max_in_flight": depth, "max_model_len": 96}
    block_bytes = 2 * 3 * 16 * 4 * 8 * 4 // tp
    with LLM(
        str(folder),
        distributed_executor_backend="uni" if tp == 1 else "threads",
        kv_cache_memory_bytes=8 * block_bytes,
        **options,
    ) as llm:
        outputs = run(llm, prompts, steps=48)
        assert llm.stats().preemptions > 0
    assert_same(folder, prompts, outputs)


@pytest.mark.slow
@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}])
def test_a_seeded_request_draws_the_same_alone_and_in_a_batch(checkpoint: Checkpoint, params: dict[str, Any]) -> None:
    folder = checkpoint("llama")
    prompts = make_prompts([5 + i for i in range(32)], seed=8)
    seeded = [SamplingParams(seed=i, max_tokens=20, ignore_eos=True, **params) for i in range(32)]
    as_dicts: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    options: Any = {"distributed_executor_backend": "uni", "kv_cache_memory_bytes": 2**22}
    with LLM(str(folder), enable_prefix_caching=False, **options) as llm:
        batch = llm.generate(as_dicts, seeded, use_tqdm=False)
        alone = [llm.generate(as_dicts[i], seeded[i], use_tqdm=False)[0] for i in range(0, 32, 5)]
    assert [a.outputs[0].token_ids for a in alone] == [batch[i].outputs[0].token_ids for i in range(0, 32, 5)]
    with LLM(str(folder), tensor_parallel_size=3, **{**options, "distributed_executor_backend": "threads"}) as llm:
        sharded = llm.generate(as_dicts, seeded, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in sharded] == [o.outputs[0].token_ids for o in batch]
    assert len({o.outputs[0].token_ids for o in batch}) == 32


def test_stops_at_eos_and_at_length(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    prompt = MIXED[3]
    produced, _ = reference(folder, tuple(prompt), STEPS)
    stop = produced[4]
    first = produced.index(stop)
    with LLM(str(folder), distributed_executor_backend="uni", kv_cache_memory_bytes=2**21) as llm:
        params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, stop_token_ids=(stop,))
        stopped = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0]
        assert (stopped.finish_reason, list(stopped.token_ids)) == ("stop", produced[: first + 1])
        params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
        cut = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].outputs[0]
        assert (cut.finish_reason, list(cut.token_ids)) == ("length", produced[:3])
        long = make_prompts([250], seed=9)[0]
        ended = llm.generate({"prompt_token_ids": long}, SamplingParams(max_tokens=99, ignore_eos=True), use_tqdm=False)
        assert (ended[0].outputs[0].finish_reason, len(ended[0].outputs[0].token_ids)) == ("length", 6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_neox", "opt_350m"])
def test_bfloat16_stays_near_float32(checkpoint: Checkpoint, name: str) -> None:
    """With 8 bits, log-probabilities change by some hundredths; with a wrong cast they would change by more than 1."""
    folder = checkpoint(name)
    for output, prompt in zip(generate(folder, MIXED, steps=4, dtype="bfloat16"), MIXED, strict=True):
        tokens = output.outputs[0].token_ids
        rows = Reference(folder).logprobs_of(prompt, tokens)
        found = output.outputs[0].logprobs
        assert found is not None
        errors = [abs(found[i][token].logprob - float(rows[i, token])) for i, token in enumerate(tokens)]
        assert sum(errors) / len(errors) < 0.25


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_cuda(checkpoint: Checkpoint, name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = checkpoint(name)
    assert_same(folder, MIXED, generate(folder, MIXED, device="cuda"))


@pytest.mark.gpu
def test_cuda_draws_the_same_in_a_cache_that_it_measured(checkpoint: Checkpoint) -> None:
    """There are more decoding sequences than attention gathers at a time, with every sampling parameter."""
    folder = checkpoint("llama")
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in make_prompts([3 + i % 40 for i in range(64)], seed=4)]
    params = SamplingParams(temperature=0.8, top_k=30, top_p=0.9, seed=5, max_tokens=16, ignore_eos=True, logprobs=2)
    found = []
    for device, options in (("cuda", {"gpu_memory_utilization": 0.5}), ("cpu", {"kv_cache_memory_bytes": 2**22})):
        with LLM(str(folder), device=device, **options) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
            if device == "cuda":
                assert llm.stats().num_blocks * 16 > 1_000_000
    # Both use float32: a draw differs only if two candidates are closer than the rounding error.
    assert sum(a == b for a, b in zip(*found, strict=True)) >= 60


@pytest.mark.parametrize(("name", "tp"), [("llama", 1), ("llama", 3), ("gemma2", 2)])
def test_tokens_do_not_depend_on_whether_all_logits_are_written(checkpoint: Checkpoint, name: str, tp: int) -> None:
    """Where nobody wants log-probabilities, a head in bfloat16 gives only the top token of each row.

    The logits of gemma2 have a softcap, so all of them are needed.
    """
    options = {"dtype": "bfloat16", "distributed_executor_backend": "uni" if tp == 1 else "threads"}
    with LLM(str(checkpoint(name)), tensor_parallel_size=tp, kv_cache_memory_bytes=2**21, **options) as llm:
        given: Any = [{"prompt_token_ids": prompt} for prompt in MIXED]
        found = [
            [
                output.outputs[0].token_ids
                for output in llm.generate(
                    given,
                    SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=count),
                    use_tqdm=False,
                )
            ]
            for count in (None, 0)
        ]
    assert found[0] == found[1]
