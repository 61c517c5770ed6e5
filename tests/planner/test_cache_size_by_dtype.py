"""Plans with a KV cache in another type than the activations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planner.test_planner import with_draft
from shoal.comm.local import LocalComm
from shoal.config.engine_options import EngineOptions, agreed
from shoal.errors import ConfigError
from shoal.models.registry import read_spec
from shoal.parallel.mesh import make_mesh
from shoal.parallel.topology import Topology
from shoal.worker.rank_model import RankModel
from support.plans import engine_plan, setup_of

Checkpoint = Callable[[str], Path]
SIZE: Any = {"kv_cache_memory_bytes": 2**22, "max_model_len": 64}


def blocks(folder: Path, kv: str, **options: Any) -> int:
    found = engine_plan(folder, dtype="bfloat16", kv_cache_dtype=kv, **SIZE, **options).num_blocks
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["llama3", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_half_the_bytes_are_twice_the_blocks(checkpoint: Checkpoint, name: str, layout: dict[str, Any]) -> None:
    folder = checkpoint(name)
    plain, head_dim = blocks(folder, "auto", **layout), read_spec(folder).head_dim
    assert blocks(folder, "bfloat16", **layout) == plain
    assert plain // 2 <= blocks(folder, "float32", **layout) <= plain / 2
    for kv in ("fp8", "fp8_e5m2"):
        assert 2 * plain <= blocks(folder, kv, **layout) <= 2 * plain + 1
    # The scale of a row takes two bytes.
    for kv in ("int8", "int8_per_token_head"):
        ratio = 2 * head_dim / (head_dim + 2)
        assert ratio * plain - 1 < blocks(folder, kv, **layout) < ratio * (plain + 1)


@pytest.mark.parametrize("kv", ["auto", "float16", "int8", "fp8"])
@pytest.mark.parametrize("name", ["llama3", "deepseek_v3"])
def test_a_rank_allocates_what_is_planned(checkpoint: Checkpoint, name: str, kv: str) -> None:
    found = engine_plan(checkpoint(name), kv_cache_dtype=kv, **SIZE)
    model = RankModel(setup_of(found), make_mesh(Topology.of(), 0, lambda *_: LocalComm()))
    assert model.block_bytes == found.ranks[0].block_bytes
    memory = model.allocate(3, torch.device("cpu"))
    slots = 3 * found.block_size + 1  # with the slot that is never read
    assert memory.pool.nbytes * found.block_size == model.block_bytes * slots
    assert not memory.pool.any()


def test_the_log_says_what_a_row_takes(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama3")
    found = engine_plan(folder, dtype="bfloat16", kv_cache_dtype="fp8", **SIZE)
    assert (found.dtype, found.kv_dtype) == ("bfloat16", "fp8_e4m3")
    (reason,) = [each for each in found.reasons if "--kv-cache-dtype" in each]
    head_dim = read_spec(folder).head_dim
    assert reason == (
        f"KV cache in fp8_e4m3, as --kv-cache-dtype asks: {head_dim} bytes for a key or value of {head_dim} numbers; "
        f"in bfloat16 it would be {2 * head_dim}"
    )
    assert not any("--kv-cache-dtype" in each for each in engine_plan(folder, **SIZE).reasons)


def test_a_draft_model_has_the_same_type(checkpoint: Checkpoint) -> None:
    plain, small = (
        with_draft(checkpoint("llama"), checkpoint("mistral"), dtype="bfloat16", kv_cache_dtype=kv)
        for kv in ("auto", "fp8")
    )
    assert plain.ranks[-1].block_bytes == 2 * small.ranks[-1].block_bytes


@pytest.mark.parametrize("value", ["fp8_inc", "fp8_ds_mla", "INT8", "half", "", 8])
def test_other_types_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^--kv-cache-dtype (must be one of auto, float32|takes a text)") as caught:
        EngineOptions.from_flat(None, {"kv_cache_dtype": value})
    assert caught.value.exit_code == 2


def test_hosts_agree_on_it() -> None:
    wide, small = (agreed(EngineOptions.from_flat(None, {"kv_cache_dtype": kv})) for kv in ("auto", "int8"))
    assert {name for name in wide if wide[name] != small[name]} == {"--kv-cache-dtype"}
