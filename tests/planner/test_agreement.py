"""What processes must have alike, and what is a host's own affair."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from shoal.config.engine_options import EngineOptions
from shoal.launch.open_model import decide
from shoal.planner.agreement import OF_RANKS, agreement
from shoal.wire.plan import ReplicaPlace

Checkpoint = Callable[[str], Path]


def test_what_a_host_has_room_for_is_its_own_affair(checkpoint: Checkpoint) -> None:
    options = [
        EngineOptions.from_flat(str(checkpoint("llama")), {"kv_cache_memory_bytes": size}) for size in (2**16, 2**24)
    ]
    decisions = [decide(each, ReplicaPlace(0, 2)) for each in options]
    assert decisions[0].max_model_len != decisions[1].max_model_len
    assert agreement(options[0], decisions[0]) == agreement(options[1], decisions[1])


def test_those_that_share_experts_take_the_same_steps_at_start(checkpoint: Checkpoint) -> None:
    flags = {"enable_expert_parallel": True, "kv_cache_memory_bytes": 2**20}
    options = EngineOptions.from_flat(str(checkpoint("mixtral")), flags)
    decision = decide(options, ReplicaPlace(0, 2))
    found = agreement(options, decision)
    measured = dataclasses.replace(decision, kv_budgets=(None,))
    tiny = dataclasses.replace(decision, max_model_len=1)
    assert agreement(options, dataclasses.replace(decision, max_model_len=40)) == found
    for other, name in ((measured, "size of the KV cache"), (tiny, "longest sequence")):
        told = agreement(options, other)
        assert {key for key in found if told[key] != found[key]} == {name}
    front_end = agreement(options, decide(options, ReplicaPlace(0, 2, local_size=0)))
    assert {key: found[key] for key in found.keys() - OF_RANKS} == front_end
