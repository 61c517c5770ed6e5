"""How many warm spares a replica keeps on each host, and why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.planner.model_reader import ModelReader
from shoal.planner.placement import ReplicaHost
from shoal.planner.planner import Planner
from shoal.wire.plan import EnginePlan, ModelFiles, ReplicaPlace
from support.plans import GIB, facts, host

MIB = 2**20


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> str:
    return str(checkpoint("llama"))


def plan(
    folder: str, available: int = 20 * GIB, replicas: int = 1, *, online: bool = True, **options: Any
) -> EnginePlan:
    given = EngineOptions.from_flat(folder, {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 16 * MIB, **options})
    reader = ModelReader(given.model_options, ModelFiles(folder))
    hosts = [ReplicaHost(given, facts(host(host_memory_available=available)))]
    return Planner(reader, hosts, ReplicaPlace(size=replicas, local_size=replicas), online=online).first_plan


def why(found: EnginePlan) -> list[str]:
    return [line for line in (*found.reasons, *found.warnings) if "spare" in line]


def test_by_default_a_server_with_several_ranks_keeps_one(folder: str) -> None:
    found = plan(folder)
    assert found.warm_spares == (1,)
    assert found.warm_spares_on(0) == 1
    (reason,) = why(found)
    assert reason == "1 warm spare for each replica, of 256.00 MiB: so that a rank that dies is replaced at once"
    for other in (
        plan(folder, online=False),
        plan(folder, tensor_parallel_size=1, distributed_executor_backend="mp"),
        plan(folder, distributed_executor_backend="threads"),
        plan(folder, warm_spares=0),
    ):
        assert (other.warm_spares, why(other)) == ((0,), [])


def test_one_is_as_good_as_several(folder: str) -> None:
    found = plan(folder, online=False, warm_spares=2)
    assert found.warm_spares == (1,)
    assert why(found) == [
        "1 warm spare for each replica, of 256.00 MiB: as --warm-spares asks",
        "--warm-spares 2: a host keeps one for each replica, enough for all its ranks",
    ]


def test_the_memory_of_the_host_must_suffice_for_all_replicas(folder: str) -> None:
    assert plan(folder, 800 * MIB, 2).warm_spares == (1,)
    found = plan(folder, 500 * MIB, 2)
    assert found.warm_spares == (0,)
    (reason,) = why(found)
    assert reason.startswith("no warm spares: 2 of 256.00 MiB need more than the 4")
    with pytest.raises(
        ConfigError, match=r"^1 warm spare for each replica: 2 of 256.00 MiB need .*give --warm-spares 0"
    ):
        plan(folder, 500 * MIB, 2, warm_spares=1)


def test_they_are_of_no_use_where_no_rank_can_be_replaced(folder: str) -> None:
    threads = plan(folder, warm_spares=1, distributed_executor_backend="threads")
    assert threads.warm_spares == (0,)
    assert any("--warm-spares 1 changes nothing: ranks of the executor threads" in line for line in threads.warnings)


def test_replicas_of_one_rank_that_share_experts_keep_one_each(checkpoint: Callable[[str], Path]) -> None:
    found = plan(str(checkpoint("mixtral")), replicas=2, tensor_parallel_size=1, enable_expert_parallel=True)
    assert found.warm_spares == (1,)
