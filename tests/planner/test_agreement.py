"""What processes must have alike, and what is a host's own affair."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.planner.agreement import RANK_KEYS, agreement
from shoal.wire.base import replace_fields
from shoal.wire.plan import ReplicaPlace
from support.plans import planner_of

Checkpoint = Callable[[str], Path]


def test_hosts_may_have_kv_caches_of_different_sizes(checkpoint: Checkpoint) -> None:
    planners = [
        planner_of(checkpoint("llama"), ReplicaPlace(0, 2), kv_cache_memory_bytes=size) for size in (2**16, 2**24)
    ]
    small, large = (agreement(each.options, each.first_plan) for each in planners)
    assert planners[0].first_plan.max_model_len != planners[1].first_plan.max_model_len
    assert small == large


def test_replicas_that_share_experts_agree_on_the_steps_of_the_start(checkpoint: Checkpoint) -> None:
    flags: dict[str, Any] = {"enable_expert_parallel": True, "kv_cache_memory_bytes": 2**20}
    planner = planner_of(checkpoint("mixtral"), ReplicaPlace(0, 2), **flags)
    options, plan = planner.options, planner.first_plan
    found = agreement(options, plan)
    measured = replace_fields(plan, ranks=tuple(replace_fields(rank, kv_budget=None) for rank in plan.ranks))
    tiny = replace_fields(plan, max_model_len=1)
    assert agreement(options, replace_fields(plan, max_model_len=40)) == found
    for other, name in ((measured, "size of the KV cache"), (tiny, "longest sequence")):
        told = agreement(options, other)
        assert {key for key in found if told[key] != found[key]} == {name}
    front_end = planner_of(checkpoint("mixtral"), ReplicaPlace(0, 2, local_size=0), **flags)
    told = agreement(front_end.options, front_end.first_plan)
    assert {key: found[key] for key in found.keys() - RANK_KEYS} == told
