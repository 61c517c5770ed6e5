"""Tests of `--kv-cache-dtype`: the tokens are those of a model whose keys and values are rounded, in every layout."""

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conformance.test_greedy_tokens import generate, make_prompts
from conformance.test_quantized import logprobs_of
from shoal import LLM, RequestOutput, SamplingParams
from shoal.kernels.kv_rows import KV_DTYPES, SCALE_DTYPE, read_rows, store_rows
from shoal.kernels.reference import ReferenceKernels
from shoal.worker import rank_model
from support.checkpoints import Reference

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import demo_text

pytestmark = pytest.mark.slow

Checkpoint = Callable[[str], Path]

PROMPTS = make_prompts([1, 2, 9, 17, 40], seed=6)
STEPS = 8
# Our keys and the reference's differ by rounding errors of float32, which change a log-probability by about 1e-6.
TYPICAL = 1e-5
# Where a number lies between two of the cache's, such an error decides which one it gets. This happens once in some
# thousand numbers, and moves one number of a key or value by 1/127 of the largest one, or by an eighth of itself.
LARGEST = 0.1


def rounded(x: Tensor, kv: str) -> Tensor:
    """Return keys or values, [batch, kv_heads, tokens, head_dim], as a cache gives them back."""
    rows = x.transpose(1, 2).flatten(0, 1)
    part, slots = torch.zeros(rows.shape, dtype=KV_DTYPES[kv]), torch.arange(len(rows))
    scales = torch.zeros(rows.shape[:2], dtype=SCALE_DTYPE) if kv == "int8" else None
    store_rows(rows, slots, part, scales)
    return read_rows(part, scales, slots, x.dtype).view(x.transpose(1, 2).shape).transpose(1, 2)


@pytest.fixture
def rounding_reference() -> Iterator[Callable[[Path, str], Reference]]:
    """transformers' model with keys and values that are rounded before attention reads them."""
    made: list[Reference] = []

    def make(folder: Path, kv: str) -> Reference:
        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
            return sdpa_attention_forward(module, query, rounded(key, kv), rounded(value, kv), *rest, **options)

        AttentionInterface.register("sdpa", attention)
        reference = Reference(folder)
        reference.model.set_attn_implementation("sdpa")
        made.append(reference)
        return reference

    yield make
    for reference in made:
        reference.model.set_attn_implementation("eager")
    AttentionInterface.register("sdpa", sdpa_attention_forward)


def errors_of(reference: Reference, outputs: list[RequestOutput]) -> list[float]:
    """Return the errors of the log-probabilities of all outputs, each of which is greedy but for such errors."""
    errors = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens, found = output.outputs[0].token_ids, output.outputs[0].logprobs
        assert found is not None
        for row, token, ours in zip(reference.logprobs_of(prompt, tokens), tokens, found, strict=True):
            assert float(row.max() - row[token]) < LARGEST
            errors += [abs(value.logprob - float(row[token_id])) for token_id, value in ours.items()]
    return errors


@pytest.mark.parametrize(
    ("name", "kv", "options"),
    [
        ("llama3", "int8", {}),
        ("llama3", "fp8_e4m3", {"tensor_parallel_size": 2}),
        ("llama3", "fp8_e5m2", {}),
        ("qwen3", "int8", {"tensor_parallel_size": 3, "tensor_parallel_split": (1, 2, 1)}),
        ("qwen3", "fp8_e4m3", {"pipeline_parallel_size": 2}),
        ("opt", "int8", {"tensor_parallel_size": 2}),
        ("llama3", "int8", {"model_impl": "transformers"}),
    ],
)
def test_numbers_are_those_of_rounded_keys_and_values(
    checkpoint: Checkpoint, rounding_reference: Callable[[Path, str], Reference], name: str, kv: str, options: Any
) -> None:
    """Heads are cut over ranks, and each has scales of its own, so all layouts round in the same way."""
    outputs = generate(checkpoint(name), PROMPTS, STEPS, kv_cache_dtype=kv, **options)
    errors = errors_of(rounding_reference(checkpoint(name), kv), outputs)
    assert statistics.median(errors) < TYPICAL
    assert max(errors) < LARGEST


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_latents_are_rounded_in_the_same_way_by_both_implementations(
    checkpoint: Checkpoint, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = generate(checkpoint("deepseek_v3"), PROMPTS, STEPS, kv_cache_dtype=kv)
    monkeypatch.setattr(rank_model, "make_kernels", lambda *_: (ReferenceKernels(), "chosen by a test"))
    plain = generate(checkpoint("deepseek_v3"), PROMPTS, STEPS, kv_cache_dtype=kv, tensor_parallel_size=2)
    errors = [abs(a - b) for a, b in zip(logprobs_of(native), logprobs_of(plain), strict=True)]
    assert statistics.median(errors) < TYPICAL
    assert max(errors) < LARGEST


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_parallel_size": 3},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}},
    ],
)
def test_stages_and_drafts_change_no_bit(checkpoint: Checkpoint, options: dict[str, Any]) -> None:
    prompts = [[5, 6, 7, 8] * 4, *PROMPTS]
    alone = generate(checkpoint("llama3"), prompts, STEPS, dtype="bfloat16", kv_cache_dtype="int8")
    found = generate(checkpoint("llama3"), prompts, STEPS, dtype="bfloat16", kv_cache_dtype="int8", **options)
    assert [each.outputs[0].token_ids for each in found] == [each.outputs[0].token_ids for each in alone]
    assert logprobs_of(found) == logprobs_of(alone)


def test_sleep_and_accuracy_of_the_bundled_model() -> None:
    """Accuracy falls by less than one percent. benchmarks/quantized_accuracy.py asks more questions of more kinds."""
    sums = sorted(demo_text.held_out_additions())[::5]
    greedy = SamplingParams(temperature=0, max_tokens=6)
    shares = {}
    for kv in ("auto", "int8", "fp8"):
        with LLM(None, kv_cache_dtype=kv, kv_cache_memory_bytes="16MiB", distributed_executor_backend="uni") as llm:
            prompts = [f"{a} + {b} =" for a, b in sums]
            texts = [output.outputs[0].text for output in llm.generate(prompts, greedy, use_tqdm=False)]
            llm.sleep(level=2)
            llm.wake_up()
            again = [output.outputs[0].text for output in llm.generate(prompts[:20], greedy, use_tqdm=False)]
        assert again == texts[:20]
        right = [text == f" {a + b}" for text, (a, b) in zip(texts, sums, strict=True)]
        shares[kv] = 100 * sum(right) / len(sums)
    assert shares["auto"] > 95
    assert min(shares.values()) >= shares["auto"] - 1
