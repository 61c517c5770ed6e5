"""The product of families, layouts and options: every pair of values by default, all of it with --matrix."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from conformance.test_sameness import assert_same, generate, make_prompts
from shoal.models.manifest import kv_block_bytes, shards
from shoal.models.registry import read_spec
from support.checkpoints import MAKERS
from support.pairwise import pairwise

OPTIONS: dict[str, list[Any]] = {
    "checkpoint": sorted(MAKERS),
    "tensor_parallel_size": [1, 2, 3],
    "block_size": [4, 16],
    "max_num_batched_tokens": [7, 2048],
    "max_in_flight": [1, 2, 3],
    "enable_prefix_caching": [True, False],
    "speculative_config": [None, {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1}],
    "room": ["plenty", "scarce"],
}
MAX_MODEL_LEN = 64
# Two that begin alike, two that are alike, and one that repeats itself.
PROMPTS = make_prompts([1, 5, 16, 33], seed=11)
PROMPTS += [[*PROMPTS[3][:20], 7, 8], list(PROMPTS[2]), [5, 6, 7, 8] * 5]
STEPS = 12


def full_product() -> list[dict[str, Any]]:
    return [dict(zip(OPTIONS, values, strict=True)) for values in product(*OPTIONS.values())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = full_product() if metafunc.config.getoption("--matrix") else pairwise(OPTIONS)
        metafunc.parametrize("case", cases, ids=["-".join(map(str, case.values())) for case in cases])


def test_same_tokens(checkpoint: Callable[[str], Path], case: dict[str, Any]) -> None:
    options = {name: value for name, value in case.items() if name not in ("checkpoint", "room")}
    folder = checkpoint(case["checkpoint"])
    cache = 2**21 if case["room"] == "plenty" else smallest_cache(folder, case)
    outputs = generate(
        folder, PROMPTS, steps=STEPS, max_model_len=MAX_MODEL_LEN, kv_cache_memory_bytes=cache, **options
    )
    assert_same(folder, PROMPTS, outputs)


def smallest_cache(folder: Path, case: dict[str, Any]) -> int:
    """Bytes for one request of the longest length, so that others are preempted."""
    size: int = case["block_size"]
    spec = read_spec(folder)
    ranks = shards(spec, case["tensor_parallel_size"])
    return -(-MAX_MODEL_LEN // size) * max(kv_block_bytes(spec, shard, size, 4) for shard in ranks)
