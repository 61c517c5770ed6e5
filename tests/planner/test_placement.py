"""The placement of ranks on hosts."""

import dataclasses
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.engine_options import EngineOptions
from shoal.config.option_forms import Placement, parse_placement
from shoal.errors import ConfigError
from shoal.planner.host_links import HostLinks, Link
from shoal.planner.host_traffic import MeasuredStep
from shoal.planner.placement import ReplicaHost, place_ranks
from support.plans import facts, host


def hosts(*devices: int, **hardware: Any) -> list[ReplicaHost]:
    return [
        ReplicaHost(
            EngineOptions(None), facts(host(num_devices=count, **hardware), name=f"h{i}"), None, f"10.0.0.{i}", i == 0
        )
        for i, count in enumerate(devices)
    ]


def placed(found: list[ReplicaHost], tp: int, stages: int, wanted: Placement = "auto") -> list[list[int]]:
    ranks = place_ranks(found, tp=tp, stages=stages, wanted=wanted, reasons=[], warnings=[])
    return [list(each) for each in ranks]


@pytest.mark.parametrize(
    ("devices", "tp", "stages", "expected"),
    [
        ((4, 4), 4, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ((2, 2), 1, 3, [[0, 1], [2]]),
        ((8, 2, 2), 2, 4, [[0, 1, 2, 3], [4, 5], [6, 7]]),
        ((1, 5), 1, 4, [[0], [1, 2, 3]]),
        ((2, 2), 2, 1, [[0], [1]]),  # fewer stages than hosts
        ((2, 1), 3, 1, [[0, 1], [2]]),  # no host has room for a group
        ((3, 3), 2, 3, [[0, 1, 2], [3, 4, 5]]),  # room for one group each, but there are three
    ],
)
def test_groups_stay_on_one_host_where_they_fit(
    devices: tuple[int, ...], tp: int, stages: int, expected: list[list[int]]
) -> None:
    assert placed(hosts(*devices), tp, stages) == expected


@given(st.lists(st.integers(1, 8), min_size=2, max_size=4), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_each_rank_has_one_place_and_each_host_has_ranks(
    devices: list[int], tp: int, stages: int, shareable: bool
) -> None:
    found = hosts(*devices, devices_shareable=shareable)
    try:
        ranks = placed(found, tp, stages)
    except ConfigError:
        assert tp * stages < len(devices) or (tp * stages > sum(devices) and not shareable)
        return
    assert [rank for each in ranks for rank in each] == list(range(tp * stages))
    assert all(ranks)
    if tp * stages <= sum(devices):
        assert all(len(each) <= count for each, count in zip(ranks, devices, strict=True))
    if all(count >= tp for count in devices) and sum(count // tp for count in devices) >= stages >= len(devices):
        assert all(len(each) % tp == 0 for each in ranks), "no group crosses hosts"


def test_the_reason_and_the_warning_are_for_the_log() -> None:
    reasons: list[str] = []
    warnings: list[str] = []
    place_ranks(hosts(1, 1), tp=2, stages=2, wanted="auto", reasons=reasons, warnings=warnings)
    assert reasons == ["ranks 0-1 on h0 (10.0.0.0), 2-3 on h1 (10.0.0.1): each tensor-parallel group is on one host"]
    assert warnings == ["4 ranks share 2 devices (h0 has 1, h1 has 1): steps will be slow"]


def test_tensor_parallel_groups_may_be_spread_over_all_hosts() -> None:
    assert placed(hosts(4, 4), 4, 2, "tp-across") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert placed(hosts(2, 1), 3, 1, "tp-across") == [[0, 1], [2]]


def test_the_ranks_of_each_host_may_be_listed_by_number_name_or_address() -> None:
    for text in ("0=0,3|1=1-2", "h0=0,3|h1=1,2", "1=1-2|10.0.0.0=3,0"):
        found = placed(hosts(2, 2), 2, 2, parse_placement(text, "--placement"))
        assert [sorted(each) for each in found] == [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("0=0-1|0=2-3", "--placement names h0 twice"),
        ("0=0-1|h0=2-3", "--placement names h0 twice"),
        ("0=0-1|h7=2-3", r"--placement names h7, which is none of the hosts: 0 \(h0, 10.0.0.0\), 1 \(h1, 10.0.0.1\)"),
        ("0=0-1|1=2", "must place each of the ranks 0-3 once, got 0-2"),
        ("0=0-1|1=1-3", "must place each of the ranks 0-3 once, got 0-1, 1-3"),
        ("0=0-3", "--placement gives h1 no ranks: lower --nnodes"),
        ("0=0-2|1=3", "h0 would run 3 ranks, but has 2 devices: choose another --placement"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(wanted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        placed(hosts(2, 2), 2, 2, parse_placement(wanted, "--placement"))


@pytest.mark.parametrize("text", ["", "0", "0=", "=0", "0=a", "0=1-0", "across", "0=0|", 3, None])
def test_a_placement_in_another_form_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="--placement takes auto, tp-across, or the ranks of each host"):
        parse_placement(text, "--placement")


def test_nodes_on_one_host_must_not_share_a_gpu() -> None:
    """Ray may give two nodes that take parts of GPUs the same one."""
    first, second = hosts(1, 1, device="cuda", devices_shareable=False, visible=("0",))
    assert placed([first, second], 2, 1) == [[0], [1]]
    with pytest.raises(ConfigError, match=r"nodes 0 and 1 of this replica share GPU 0 of h1 \(10\..*more than half"):
        placed([first, dataclasses.replace(second, address=first.address, number=1)], 2, 1)


def test_a_placement_survives_the_way_to_another_host() -> None:
    assert parse_placement([["0", [0, 1]], ["1", [2]]], "--placement") == parse_placement("0=0-1|1=2", "--placement")


def test_hosts_that_cannot_work_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a layout of 1 rank cannot use 2 hosts: lower --nnodes"):
        placed(hosts(2, 2), 1, 1)
    with pytest.raises(ConfigError, match=r"8 ranks need as many devices, but all hosts together have 6"):
        placed(hosts(4, 2, devices_shareable=False), 4, 2)
    mixed = [*hosts(2), *hosts(2, device="cuda")]
    with pytest.raises(ConfigError, match="must have devices of one kind, but h0 has cpu, h0 has cuda"):
        placed(mixed, 2, 1)


def two_racks(hosts: int, stages: int) -> MeasuredStep:
    """Return a step on hosts of which those with even numbers have fast links, and those with odd ones."""
    pairs = combinations(range(hosts), 2)
    links = {(i, j): Link(1e-5, 1e10) if i % 2 == j % 2 else Link(1e-3, 1e8) for i, j in pairs}
    return MeasuredStep(HostLinks(links), layers=(2,) * stages, stream_bytes=4096, tokens=16)


def test_hosts_with_fast_links_share_a_tensor_parallel_group() -> None:
    reasons: list[str] = []
    step = two_racks(4, 2)
    ranks = place_ranks(hosts(2, 2, 2, 2), tp=4, stages=2, wanted="auto", reasons=reasons, warnings=[], step=step)
    assert ranks == ((0, 1), (4, 5), (2, 3), (6, 7))
    assert reasons[0].startswith(
        "the measured links put the hosts into the order h0 (10.0.0.0), h2 (10.0.0.2), h1 (10.0.0.1), h3 (10.0.0.3): "
        "what they exchange in a step of 16 tokens takes about "
    )


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.integers(1, 4), st.integers(1, 6))
def test_measured_links_only_exchange_the_ranks_of_hosts(devices: list[int], tp: int, stages: int) -> None:
    found = hosts(*devices)
    try:
        without = place_ranks(found, tp=tp, stages=stages, wanted="auto", reasons=[], warnings=[])
    except ConfigError:
        return
    step = two_racks(len(devices), stages)
    ranks = place_ranks(found, tp=tp, stages=stages, wanted="auto", reasons=[], warnings=[], step=step)
    assert sorted(ranks) == sorted(without)
    if tp * stages <= sum(devices):
        assert all(len(each) <= count for each, count in zip(ranks, devices, strict=True))


@pytest.mark.parametrize("wanted", ["tp-across", "0=0|1=1|2=2"])
def test_a_placement_that_was_asked_for_is_not_changed(wanted: str) -> None:
    wish = parse_placement(wanted, "--placement")
    stages, tp = (1, 3) if wanted == "tp-across" else (3, 1)
    for step in (None, two_racks(3, stages)):
        ranks = place_ranks(hosts(1, 1, 1), tp=tp, stages=stages, wanted=wish, reasons=[], warnings=[], step=step)
        assert ranks == ((0,), (1,), (2,))
