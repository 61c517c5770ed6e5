"""Plans of replicas for tests: plans of a real model on a made-up host, and plans without a model."""

from pathlib import Path
from typing import Any

from shoal import env
from shoal.config.engine_options import EngineOptions
from shoal.devices.hardware import Hardware
from shoal.planner.model_reader import ModelReader
from shoal.planner.placement import ReplicaHost
from shoal.planner.planner import Planner
from shoal.wire.base import WIRE_VERSION, replace_fields
from shoal.wire.hosts import HostFacts
from shoal.wire.plan import EnginePlan, Layout, ModelFiles, ModelPlan, RankPlan, ReplicaPlace, ShardPlan, Timeouts
from shoal.wire.ranks import RankSetup

GIB = 2**30


def host(**changes: Any) -> Hardware:
    """Return the hardware of a made-up host: two CPU cores and 20 GiB of free memory."""
    facts: dict[str, Any] = {
        "device": "cpu",
        "num_devices": 2,
        "cores": (0, 1),
        "host_memory": 24 * GIB,
        "host_memory_available": 20 * GIB,
        "device_memory": None,
        "devices_shareable": True,
    }
    return Hardware(**{**facts, **changes})


def facts(hardware: Hardware | None = None, **changes: Any) -> HostFacts:
    """Return the facts about a made-up host with our environment. The default hardware is `host()`."""
    return replace_fields(HostFacts("here", hardware or host(), env.cpu_kv_cache_bytes()), **changes)


def planner_of(
    folder: Path | str, place: ReplicaPlace | None = None, hardware: Hardware | None = None, **options: Any
) -> Planner:
    """Return the planner of a host. Without a place, it plans all replicas that the options ask for."""
    parsed = EngineOptions.from_flat(str(folder), options)
    count = parsed.parallel.data_parallel_size
    place = place or ReplicaPlace(size=count, local_size=count)
    reader = ModelReader(parsed.model_options, ModelFiles(str(folder)))
    return Planner(reader, [ReplicaHost(parsed, facts(hardware))], place)


def engine_plan(
    folder: Path | str, place: ReplicaPlace | None = None, hardware: Hardware | None = None, **options: Any
) -> EnginePlan:
    """Return the plan of one replica of the model in a folder."""
    return planner_of(folder, place, hardware, **options).first_plan


SHARD = ShardPlan(0, 0, 1, (0, 1), (0, 1), (0, 1), (0,), {}, None, (1,))


def bare_rank(rank: int = 0, **changes: Any) -> RankPlan:
    """Return the plan of a rank that holds nothing."""
    plain: dict[str, Any] = {
        "rank": rank,
        "host": "here",
        "device": "cpu",
        "device_index": rank,
        "cores": (0,),
        "shard": SHARD,
        "draft_shard": None,
        "weight_bytes": 0,
        "activation_bytes": 0,
        "context_token_bytes": 0,
        "block_bytes": 0,
        "kv_budget": None,
        "cost_share": 1.0,
    }
    return RankPlan(**{**plain, **changes})


def bare_plan(*ranks: RankPlan, **changes: Any) -> EnginePlan:
    """Return a plan without a model. Without `ranks`, it has one rank that holds nothing."""
    plain: dict[str, Any] = {
        "name": "model",
        "place": ReplicaPlace(),
        "model": ModelPlan("/nowhere"),
        "layout": Layout(tp=max(len(ranks), 1)),
        "ranks": ranks or (bare_rank(),),
        "executor": "uni",
        "dtype": "float32",
        "kv_dtype": "float32",
        "vocab_size": 16,
        "max_model_len": 16,
        "asked_model_len": 0,
        "block_size": 16,
        "prefix_caching": True,
        "memory_utilization": 0.9,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 16,
        "max_in_flight": 2,
        "window": None,
        "prompt_logprobs": 1,
        "load_format": "auto",
        "seed": 0,
        "timeouts": Timeouts(5.0, 5.0, 5.0),
    }
    return EnginePlan(**{**plain, **changes})


def setup_of(plan: EnginePlan, rank: int = 0, incarnation: int = 0) -> RankSetup:
    """Return the first message to a rank of a plan."""
    return RankSetup(WIRE_VERSION, incarnation, rank, plan)


def with_cache(plan: EnginePlan, kv_budget: int) -> EnginePlan:
    """Return the plan with another size of each rank's KV cache, in bytes."""
    return replace_fields(plan, ranks=tuple(replace_fields(rank, kv_budget=kv_budget) for rank in plan.ranks))
