"""Tests that the bits of a result depend neither on the chunks of a prompt nor on hits in the prefix cache."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from conformance.test_greedy_tokens import make_prompts
from conformance.test_parameters import run
from shoal import LLM, RequestOutput, SamplingParams
from shoal.outputs import Logprob

pytestmark = pytest.mark.slow

Checkpoint = Callable[[str], Path]
PROMPTS = make_prompts([5, 230, 90, 33], seed=3)

Numbers = list[list[tuple[int, float]]]


def numbers(logprobs: Mapping[int, Logprob] | None) -> list[tuple[int, float]]:
    return sorted((token, each.logprob) for token, each in (logprobs or {}).items())


def numbers_of_prompt(output: RequestOutput) -> Numbers:
    assert output.prompt_logprobs is not None
    return [numbers(each) for each in output.prompt_logprobs]


def numbers_of_output(output: RequestOutput) -> Numbers:
    assert output.outputs[0].logprobs is not None
    return [numbers(each) for each in output.outputs[0].logprobs]


@pytest.mark.parametrize(
    ("family", "budgets", "dtype", "kv"),
    [
        *[("qwen3", (2048, 64, 16), dtype, "auto") for dtype in ("float32", "bfloat16")],
        *[("gemma2", (2048, 16), dtype, "auto") for dtype in ("float32", "bfloat16")],
        *[("deepseek_v3", (2048, 16), dtype, "auto") for dtype in ("float32", "bfloat16")],
        ("qwen3", (2048, 16), "bfloat16", "int8"),
        ("qwen3", (2048, 16), "float32", "fp8_e5m2"),
        ("gemma2", (2048, 16), "bfloat16", "fp8"),
        ("deepseek_v3", (2048, 16), "bfloat16", "int8"),
    ],
)
def test_chunks_and_prefix_hits_change_no_bit(
    checkpoint: Checkpoint, family: str, budgets: tuple[int, ...], dtype: str, kv: str
) -> None:
    """gemma2 has windows and a softcap, deepseek_v3 latent attention and experts. budgets: of tokens, for a step."""
    whole = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=0)
    again = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3)
    expected: tuple[list[Numbers], list[Numbers]] | None = None
    for budget in budgets:
        with LLM(
            str(checkpoint(family)),
            distributed_executor_backend="uni",
            dtype=dtype,
            kv_cache_dtype=kv,
            max_num_batched_tokens=budget,
            max_num_seqs=8,
            kv_cache_memory_bytes=2**22,
        ) as llm:
            first = run(llm, PROMPTS, whole)
            second = run(llm, PROMPTS, again)
            hits = llm.stats().prefix_hits
        outputs = [numbers_of_output(output) for output in first]
        found = [numbers_of_prompt(output) for output in first], outputs
        expected = expected or found
        assert found == expected, f"at most {budget} tokens in a step"
        assert hits > 200
        assert [numbers_of_output(output) for output in second] == outputs, "prefix hits"
