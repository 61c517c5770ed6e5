"""Tests of combinations of families, layouts and options: pairwise by default, all combinations with --matrix."""

from collections.abc import Callable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest

from conformance.test_greedy_tokens import assert_same, generate, make_prompts
from shoal.launch.open_model import open_model
from support.checkpoints import MAKERS
from support.pairwise import pairwise

LAYOUTS: dict[str, list[Any]] = {
    "checkpoint": sorted(MAKERS),
    "tensor_parallel_size": [1, 2, 3],
    "pipeline_parallel_size": [1, 2, 3],
    "data_parallel_size": [1, 2],
    "experts": ["cut", "linear", "round_robin"],  # for models with experts
}
OPTIONS: dict[str, list[Any]] = {
    "block_size": [4, 16],
    "max_num_batched_tokens": [7, 2048],
    "max_in_flight": [1, 2, 3],
    "enable_prefix_caching": [True, False],
    "speculative_config": [None, {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}],
    "room": ["plenty", "scarce"],
}
MIXTURES = {"mixtral", "granitemoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"}
MAX_MODEL_LEN = 64
# Two prompts have the same beginning, two are equal, and one repeats itself.
PROMPTS = make_prompts([1, 5, 16, 33], seed=11)
PROMPTS += [[*PROMPTS[3][:20], 7, 8], list(PROMPTS[2]), [5, 6, 7, 8] * 5]
STEPS = 8
# A default run pairs fewer values: test_hub_files.py has two tensor-parallel ranks of every family, test_pipeline.py
# three stages, test_expert_parallel.py every mixture with experts in both orders; elsewhere two steps are in flight.
FEWER: dict[str, list[Any]] = {
    "tensor_parallel_size": [1, 3],
    "pipeline_parallel_size": [1, 2],
    "experts": ["cut", "round_robin"],
    "max_in_flight": [1, 3],
}
# Layouts of process ranks: each axis alone, and pairs of axes. Every family runs with thread ranks.
OVER_PROCESSES: dict[str, dict[str, Any]] = {
    "opt": {"tensor_parallel_size": 3},
    "qwen3": {"pipeline_parallel_size": 3},
    "gpt2": {"data_parallel_size": 2},
    "gemma2": {"pipeline_parallel_size": 2, "data_parallel_size": 2},
    "mixtral": {"tensor_parallel_size": 2, "experts": "linear"},
    "granitemoe": {"data_parallel_size": 3, "experts": "round_robin"},
    "qwen2_moe": {"pipeline_parallel_size": 2, "data_parallel_size": 2, "experts": "round_robin"},
    "deepseek_v3": {"tensor_parallel_size": 2, "data_parallel_size": 2, "experts": "linear"},
    "deepseek_v2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}
# The others only with --matrix: test_pipeline.py has stages in processes, test_data_parallel.py replicas that share
# experts.
ALWAYS_OVER_PROCESSES = ("mixtral",)


def full_product() -> Iterator[dict[str, Any]]:
    """Return every layout of every family, with changing options, and every set of options, with some of both."""
    options, layouts = (list(_product(values)) for values in (OPTIONS, LAYOUTS))
    layouts = [layout for layout in layouts if layout["experts"] == "cut" or layout["checkpoint"] in MIXTURES]
    yield from ({**layout, **each} for layout, each in zip(layouts, cycle(options), strict=False))
    for each in options:
        yield from ({**layout, **each} for layout in layouts[:: len(layouts) // 7])


def _product(values: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    return (dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--matrix")
        cases = list(full_product()) if whole else pairwise({**LAYOUTS, **OPTIONS, **FEWER})
        metafunc.parametrize("case", cases, ids=["-".join(map(str, case.values())) for case in cases])
    if "over_processes" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--matrix")
        metafunc.parametrize("over_processes", OVER_PROCESSES if whole else ALWAYS_OVER_PROCESSES)


def test_same_tokens(checkpoint: Callable[[str], Path], case: dict[str, Any]) -> None:
    if case["checkpoint"] not in MIXTURES:  # replicas that share no experts compute by themselves
        case = {**case, "data_parallel_size": 1}
    options = layout(case["checkpoint"], case)
    options |= {name: case[name] for name in OPTIONS if name != "room"}
    folder = checkpoint(case["checkpoint"])
    options |= {"max_model_len": MAX_MODEL_LEN, "distributed_executor_backend": "threads"}
    options["kv_cache_memory_bytes"] = 2**21 if case["room"] == "plenty" else smallest_cache(folder, options)
    assert_same(folder, PROMPTS, generate(folder, PROMPTS, steps=STEPS, **options))


@pytest.mark.slow
def test_same_tokens_over_processes(checkpoint: Callable[[str], Path], over_processes: str) -> None:
    folder = checkpoint(over_processes)
    options = layout(over_processes, OVER_PROCESSES[over_processes]) | {"distributed_executor_backend": "auto"}
    assert_same(folder, PROMPTS, generate(folder, PROMPTS, steps=STEPS, max_model_len=MAX_MODEL_LEN, **options))


def layout(name: str, case: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a layout, with a placement of experts if the model has any."""
    found = {axis: size for axis, size in case.items() if axis in LAYOUTS and axis.endswith("_size")}
    placement = case.get("experts", "cut")
    if placement != "cut" and name in MIXTURES:
        found |= {"enable_expert_parallel": True, "expert_placement_strategy": placement}
    return found


def smallest_cache(folder: Path, options: dict[str, Any]) -> int:
    """Return the bytes of a KV cache for one request of the longest length, so that others are preempted."""
    ranks = open_model(str(folder), {**options, "kv_cache_memory_bytes": 2**21}).plan.ranks
    blocks: int = -(-MAX_MODEL_LEN // options["block_size"])
    return blocks * max(rank.block_bytes for rank in ranks)
