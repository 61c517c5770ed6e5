"""What processes must have alike, and what is a host's own affair."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.planner.agreement import OF_RANKS, agreement
from shoal.wire.base import replace_fields
from shoal.wire.plan import ReplicaPlace
from support.plans import planner_of

Checkpoint = Callable[[str], Path]


def test_what_a_host_has_room_for_is_its_own_affair(checkpoint: Checkpoint) -> None:
    planners = [
        planner_of(checkpoint("llama"), ReplicaPlace(0, 2), kv_cache_memory_bytes=size) for size in (2**16, 2**24)
    ]
    small, large = (agreement(each.options, each.first) for each in planners)
    assert planners[0].first.max_model_len != planners[1].first.max_model_len
    assert small == large


def test_those_that_share_experts_take_the_same_steps_at_start(checkpoint: Checkpoint) -> None:
    flags: dict[str, Any] = {"enable_expert_parallel": True, "kv_cache_memory_bytes": 2**20}
    planner = planner_of(checkpoint("mixtral"), ReplicaPlace(0, 2), **flags)
    options, plan = planner.options, planner.first
    found = agreement(options, plan)
    measured = replace_fields(plan, ranks=tuple(replace_fields(rank, kv_budget=None) for rank in plan.ranks))
    tiny = replace_fields(plan, max_model_len=1)
    assert agreement(options, replace_fields(plan, max_model_len=40)) == found
    for other, name in ((measured, "size of the KV cache"), (tiny, "longest sequence")):
        told = agreement(options, other)
        assert {key for key in found if told[key] != found[key]} == {name}
    front_end = planner_of(checkpoint("mixtral"), ReplicaPlace(0, 2, local_size=0), **flags)
    told = agreement(front_end.options, front_end.first)
    assert {key: found[key] for key in found.keys() - OF_RANKS} == told
