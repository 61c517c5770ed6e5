"""Tests of `--quantization`: its tokens are those of dequantized weights, in every layout."""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conformance.test_bundled_model import QUESTIONS, answers
from conformance.test_greedy_tokens import generate, make_prompts
from shoal import LLM, RequestOutput, SamplingParams
from shoal.models.implementation import shards_of
from shoal.models.manifest import Cut
from shoal.models.registry import read_spec
from support.quantized_reference import QuantizedReference

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import demo_text

pytestmark = pytest.mark.slow

Checkpoint = Callable[[str], Path]

PROMPTS = make_prompts([1, 2, 9, 17, 40], seed=4)
# Ours and the reference's rows differ by rounding errors of float32, which change a log-probability by about 1e-6.
TYPICAL = 1e-5
# Where a number lies between two codes, such an error decides which one it gets. This happens once in some thousand
# numbers. Then an input of a layer is off by 1/127 of the largest one; all later layers and tokens see the difference.
LARGEST = 0.3


def cuts_of(folder: Path, tp: int, split: tuple[int, ...] | None) -> dict[str, list[range]]:
    """Return the inputs of each rank of the layers that are cut by rows."""
    shards = shards_of(read_spec(folder), tp, split)
    heads, columns = ([shard.ranges[cut] for shard in shards] for cut in (Cut.Q_HEADS, Cut.MLP))
    return {"o_proj": heads, "out_proj": heads, "down_proj": columns, "fc2": columns}


@pytest.mark.parametrize(
    ("name", "quantization", "tp", "options"),
    [
        ("llama3", "int8", 1, {}),
        ("llama3", "int8", 2, {}),
        ("llama3", "int8", 2, {"model_impl": "transformers"}),
        ("qwen3", "int8", 2, {"pipeline_parallel_size": 2}),
        ("opt", "int8", 3, {"tensor_parallel_split": (1, 3, 2)}),
        ("llama3", "int4", 1, {}),
        ("qwen3", "int4-g32", 2, {"model_impl": "transformers"}),
        ("opt", "int4-g64", 3, {"tensor_parallel_split": (1, 3, 2)}),
    ],
)
def test_tokens_are_those_of_dequantized_weights(
    checkpoint: Checkpoint, name: str, quantization: str, tp: int, options: dict[str, Any]
) -> None:
    """The reference has the scales that ranks have: each makes those of its own slices."""
    folder = checkpoint(name)
    reference = QuantizedReference(folder, cuts_of(folder, tp, options.get("tensor_parallel_split")), quantization)
    outputs = generate(folder, PROMPTS, steps=12, tensor_parallel_size=tp, quantization=quantization, **options)
    errors = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        found = output.outputs[0].logprobs
        assert found is not None
        for row, token, ours in zip(reference.logprobs_of(prompt, tokens), tokens, found, strict=True):
            assert float(row.max() - row[token]) < LARGEST
            errors += [abs(value.logprob - float(row[token_id])) for token_id, value in ours.items()]
    assert statistics.median(errors) < TYPICAL
    assert max(errors) < LARGEST


def logprobs_of(outputs: list[RequestOutput]) -> list[float]:
    """Return the log-probabilities of the drawn tokens."""
    rows = [(each.outputs[0].token_ids, each.outputs[0].logprobs or ()) for each in outputs]
    return [row[token].logprob for tokens, found in rows for token, row in zip(tokens, found, strict=True)]


@pytest.mark.parametrize(
    ("name", "dtype", "quantization"),
    [
        ("llama3", "bfloat16", "int8"),
        ("mixtral", "float32", "int8"),
        ("deepseek_v3", "bfloat16", "int8"),
        ("mixtral", "bfloat16", "int4"),
    ],
)
@pytest.mark.parametrize("layout", [{"pipeline_parallel_size": 3}, {"data_parallel_size": 2}])
def test_layouts_that_add_nothing_over_ranks_give_the_same_bits(
    checkpoint: Checkpoint, name: str, dtype: str, quantization: str, layout: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"steps": 8, "dtype": dtype, "quantization": quantization}
    alone = generate(checkpoint(name), PROMPTS, **options)
    found = generate(checkpoint(name), PROMPTS, **options, **layout)
    assert [each.outputs[0].token_ids for each in found] == [each.outputs[0].token_ids for each in alone]
    assert logprobs_of(found) == logprobs_of(alone)


def test_quantization_changes_numbers(checkpoint: Checkpoint) -> None:
    formats = (None, "int8", "int4", "int4-g32")
    outputs = [generate(checkpoint("llama3"), PROMPTS, steps=1, quantization=each) for each in formats]
    assert len({tuple(logprobs_of(each)) for each in outputs}) == len(formats)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_whole_experts_on_ranks(checkpoint: Checkpoint, name: str, placement: str) -> None:
    """The sums over ranks have another order, with the consequences that are described above."""
    layout: dict[str, Any] = {
        "data_parallel_size": 2,
        "enable_expert_parallel": True,
        "expert_placement_strategy": placement,
    }
    options: dict[str, Any] = {"steps": 1, "quantization": "int8"}
    alone = logprobs_of(generate(checkpoint(name), PROMPTS, **options))
    found = logprobs_of(generate(checkpoint(name), PROMPTS, **options, **layout))
    errors = [abs(a - b) for a, b in zip(alone, found, strict=True)]
    assert statistics.median(errors) < TYPICAL
    assert max(errors) < LARGEST


def test_float16(checkpoint: Checkpoint) -> None:
    """Its linear layers are computed in float32 and rounded: 11 bits, which move logits of about 10 by about 0.01."""
    options: dict[str, Any] = {"steps": 1, "quantization": "int8"}
    wide, half = (logprobs_of(generate(checkpoint("llama3"), PROMPTS, dtype=t, **options)) for t in ("float32", "half"))
    assert wide != half
    assert max(abs(a - b) for a, b in zip(wide, half, strict=True)) < LARGEST


@pytest.mark.parametrize("model", [None, "bundled:moe"])
@pytest.mark.parametrize(("quantization", "tp", "pp"), [("int8", 1, 1), ("int8", 3, 2), ("int4", 3, 2)])
def test_the_bundled_models_give_the_same_answers(model: str | None, quantization: str, tp: int, pp: int) -> None:
    layout = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    backend = "uni" if tp * pp == 1 else "threads"
    found = answers(model, quantization=quantization, distributed_executor_backend=backend, **layout)
    assert found == list(QUESTIONS.values())


def test_accuracy_falls_by_less_than_one_percent() -> None:
    """benchmarks/quantized_accuracy.py asks more questions of more kinds."""
    sums = sorted(demo_text.held_out_additions())[::3]
    greedy = SamplingParams(temperature=0, max_tokens=6)
    shares = []
    for quantization in (None, "int8", "int4"):
        with LLM(None, quantization=quantization, kv_cache_memory_bytes="64MiB") as llm:
            outputs = llm.generate([f"{a} + {b} =" for a, b in sums], greedy, use_tqdm=False)
        right = [output.outputs[0].text == f" {a + b}" for output, (a, b) in zip(outputs, sums, strict=True)]
        shares.append(100 * sum(right) / len(sums))
    assert min(shares) >= shares[0] - 1
    assert shares[0] > 95


def test_over_processes(checkpoint: Checkpoint) -> None:
    options: dict[str, Any] = {"steps": 6, "quantization": "int8", "pipeline_parallel_size": 2}
    alone = generate(checkpoint("llama3"), PROMPTS, steps=6, quantization="int8")
    found = generate(checkpoint("llama3"), PROMPTS, distributed_executor_backend="mp", **options)
    assert [output.outputs[0].token_ids for output in found] == [output.outputs[0].token_ids for output in alone]


def test_drafts_and_other_requests_change_no_bit(checkpoint: Checkpoint) -> None:
    """Rows have the same bits with other rows beside them. All prompts fit into one step, so none is cut in two."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}
    prompts = [[5, 6, 7, 8] * 4, *PROMPTS[:3]]
    options: dict[str, Any] = {"steps": 8, "quantization": "int8"}
    alone = [generate(checkpoint("llama3"), [prompt], **options)[0] for prompt in prompts]
    together = generate(checkpoint("llama3"), prompts, speculative_config=ngram, **options)
    assert [each.outputs[0].token_ids for each in together] == [each.outputs[0].token_ids for each in alone]
    assert logprobs_of(together) == logprobs_of(alone)
