"""What communication has cost, from made-up stats and from real ranks."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import LLM, AsyncLLM, SamplingParams
from shoal.cluster.stats import merge_stats
from shoal.llm.comm_profile import profile_replicas, replicas_of
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineStats
from shoal.wire.traffic import Traffic, sum_traffic, traffic_since
from support.fakes import steady
from support.fleet_status import engine, ranks

WAIT_S = 60.0
KEYS = st.sampled_from([("tp", "all_reduce"), ("tp", "all_gather"), ("pp", "send")])


@st.composite
def traffics(draw: st.DrawFn) -> Traffic:
    waits = draw(st.dictionaries(st.integers(0, 3), st.integers(1, 50)))
    return Traffic(
        *draw(KEYS),
        draw(st.integers(1, 9)),
        draw(st.integers(0, 900)),
        sum(waits.values()) + draw(st.integers(0, 90)),
        sum(waits.values()),
        tuple(sorted(waits.items())),
    )


@given(st.lists(traffics()), st.lists(traffics()))
@steady
def test_what_came_since_is_what_was_added(before: Sequence[Traffic], more: Sequence[Traffic]) -> None:
    found = traffic_since(before, sum_traffic([*before, *more]))
    assert sorted(found, key=str) == sorted(sum_traffic(more), key=str)


def replica(first_pid: int, *traffic: Traffic, busy_us: int = 1_000_000) -> EngineStats:
    of_ranks = ranks(first_pid=first_pid, busy_us=busy_us)
    return engine(of_ranks=[replace_fields(of_ranks[0], traffic=traffic, stage_wait_us=busy_us), of_ranks[1]])


def test_a_profile_divides_the_time_of_steps() -> None:
    first = replica(
        10,
        Traffic("tp", "all_reduce", 4, 2048, 600_000, 450_000, ((0, 50_000), (3, 400_000))),
        Traffic("pp", "recv", 4, 0, 900_000),
        Traffic("ep", "all_to_all", 4, 100),
    )
    profile = profile_replicas([first, replica(20)])
    assert profile.step_s == 6.0
    assert [(cost.operation, cost.seconds, cost.moving_s, cost.waiting_s) for cost in profile.costs] == [
        ("recv", 0.9, None, None),
        ("all_reduce", 0.6, pytest.approx(0.15), 0.45),
        ("all_to_all", None, None, None),
    ]
    lines = profile.table().splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["axis", "pp", "tp", "ep"]
    assert "rank 1 of replica 1 (400.0 ms)" in lines[2]  # rank 3 of all
    assert lines[2].endswith("10.0 %")
    assert lines[4] == "in all 25.0 % of the 6.00 s that the ranks spent on steps, added up"
    shown = profile.as_json()["operations"][1]
    assert shown["waited_for"][0] == {"replica": 1, "rank": 1, "seconds": 0.4}
    assert (shown["calls"], shown["sent_bytes"], shown["share"]) == (4, 2048, pytest.approx(0.1))


def test_a_profile_counts_from_earlier_stats() -> None:
    earlier = merge_stats([replica(10, Traffic("tp", "all_reduce", 4, 40, 500, 300, ((1, 300),)), busy_us=1000)])
    later = merge_stats([replica(10, Traffic("tp", "all_reduce", 6, 60, 900, 500, ((1, 500),)), busy_us=3000)])
    profile = profile_replicas(replicas_of(later), replicas_of(earlier))
    (cost,) = profile.costs
    assert (cost.calls, cost.sent_bytes, cost.seconds, cost.waiting_s) == (2, 20, 0.0004, 0.0002)
    assert profile.step_s == 3 * 0.002


def test_ranks_that_are_alone_have_no_table() -> None:
    assert profile_replicas([]).table() == "ranks have exchanged no tensors: each is alone in its replica"


def test_an_llm_prints_the_table_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with LLM(tensor_parallel_size=2, distributed_executor_backend="threads", profile_comm=True) as llm:
        llm.generate("1 + 1 =", SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
        assert "share of steps" not in capsys.readouterr().err
    row = next(line for line in capsys.readouterr().err.splitlines() if "all_reduce" in line).split()
    assert row[:2] == ["tp", "all_reduce"]
    assert int(row[2]) % (2 * 4) == 0  # both ranks, in each step


def test_an_async_llm_prints_the_table_when_it_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        options: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "threads"}
        async with AsyncLLM(profile_comm=True, **options) as llm:
            await llm.ready(WAIT_S)  # the ranks have warmed up
        llm.close()

    asyncio.run(scenario())
    shown = capsys.readouterr().err
    assert shown.count("share of steps") == 1
    assert "all_reduce" in shown
