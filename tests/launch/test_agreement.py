"""The agreement: the options and files that hosts must have in common, and those that each may choose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.config.engine_options import EngineOptions
from shoal.launch.agreement import host_agreement, replica_agreement
from shoal.wire.base import replace_fields
from shoal.wire.plan import ModelFiles, ReplicaPlace
from support.plans import planner_of

Checkpoint = Callable[[str], Path]


def of_host(folder: Path, tokenizer: Path | None = None, draft: str = "", **options: Any) -> dict[str, str]:
    parsed = EngineOptions.from_flat(str(folder), options)
    return host_agreement(parsed, ModelFiles(str(folder), draft), str(tokenizer or folder))


def test_hosts_may_have_kv_caches_and_folders_of_their_own(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    wanted = of_host(folder, kv_cache_memory_bytes=2**16)
    assert of_host(folder, kv_cache_memory_bytes=2**24, tokenizer=folder) == wanted


def differing(folder: Path, *others: Any, **options: Any) -> set[str]:
    """The names in which a host differs from one with the same model and no options."""
    here, there = of_host(folder), of_host(*others, **options)
    return {name for name in here.keys() | there.keys() if here.get(name) != there.get(name)}


def test_a_difference_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, other = checkpoint("llama"), checkpoint("mixtral")
    assert differing(folder, folder, block_size=32) == {"--block-size"}
    assert differing(folder, folder, hf_overrides={"rope_theta": 7.0}) == {"--hf-overrides", "config.json"}
    assert {"config.json", "set of weights"} <= differing(folder, other, folder)
    assert differing(folder, folder, None, str(other)) == {"draft model's config.json", "draft model's set of weights"}
    (tmp_path / "tokenizer.json").write_text("{}")
    assert differing(folder, folder, tmp_path) == {"tokenizer"}


def test_replicas_that_share_experts_agree_on_the_steps_of_the_start(checkpoint: Checkpoint) -> None:
    flags: dict[str, Any] = {"enable_expert_parallel": True, "kv_cache_memory_bytes": 2**20}
    plan = planner_of(checkpoint("mixtral"), ReplicaPlace(0, 2), **flags).first_plan
    host = {"config.json": "abc"}
    found = replica_agreement(host, plan)
    assert found["config.json"] == "abc"
    assert replica_agreement(host, replace_fields(plan, max_model_len=40)) == found
    measured = replace_fields(plan, ranks=tuple(replace_fields(rank, kv_budget=None) for rank in plan.ranks))
    tiny = replace_fields(plan, max_model_len=1)
    for other, name in ((measured, "size of the KV cache"), (tiny, "longest sequence")):
        agreement = replica_agreement(host, other)
        assert {key for key in found if agreement[key] != found[key]} == {name}
    alone = planner_of(checkpoint("mixtral"), ReplicaPlace(0, 2)).first_plan
    assert replica_agreement(host, alone) == host
