"""The order of hosts by measured links, compared with all orders."""

from collections.abc import Sequence
from itertools import combinations, pairwise, permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shoal.planner.host_links import HostLinks, Link
from shoal.planner.host_order import LEAST_GAIN, order_hosts
from shoal.planner.host_traffic import MeasuredStep, host_exchanges
from shoal.wire.base import Ids
from support.example_counts import examples

FAST, SLOW = Link(20e-6, 10e9), Link(400e-6, 1e8)
Placed = Sequence[Ids]


def step(links: dict[tuple[int, int], Link], stages: int, tokens: int = 64) -> MeasuredStep:
    return MeasuredStep(HostLinks(links), layers=(4,) * stages, stream_bytes=8192, tokens=tokens)


def in_racks(racks: Sequence[int]) -> dict[tuple[int, int], Link]:
    """Return the links of hosts of which those in one rack have fast links."""
    pairs = combinations(range(len(racks)), 2)
    return {(first, second): FAST if racks[first] == racks[second] else SLOW for first, second in pairs}


def placed_in_order(counts: Sequence[int]) -> list[Ids]:
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    return [tuple(range(first, first + count)) for first, count in zip(firsts, counts, strict=True)]


links = st.builds(Link, st.floats(1e-6, 1e-3), st.floats(1e7, 1e11))


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, list[int], list[int], MeasuredStep]:
    """Draw tensor-parallel ranks of a stage, the ranks of each place, the room of each host, and their links."""
    hosts = draw(st.integers(2, 4))
    tp = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(1, 4), min_size=hosts, max_size=hosts))
    counts[-1] += -sum(counts) % tp
    room = [count + draw(st.integers(0, 3)) for count in counts]
    found = {pair: draw(links) for pair in combinations(range(hosts), 2)}
    return tp, counts, room, step(found, sum(counts) // tp, draw(st.sampled_from([1, 64, 2048])))


@settings(max_examples=examples(60), deadline=None)
@given(cases())
def test_no_order_of_the_hosts_is_better_by_more_than_the_least_gain(
    case: tuple[int, list[int], list[int], MeasuredStep],
) -> None:
    tp, counts, room, measured = case
    exchanges = host_exchanges(tp, measured.layers, placed_in_order(counts))
    order = order_hosts(exchanges, counts, room, measured)
    assert sorted(order) == list(range(len(counts))), "it is a permutation"
    assert all(count <= room[host] for count, host in zip(counts, order, strict=True))
    fitting = [
        each
        for each in permutations(range(len(counts)))
        if all(count <= room[host] for count, host in zip(counts, each, strict=True))
    ]
    least = min(measured.seconds(exchanges, each) for each in fitting)
    took, asis = measured.seconds(exchanges, order), measured.seconds(exchanges, range(len(counts)))
    if order == tuple(range(len(counts))):
        assert took * (1 - LEAST_GAIN) <= least
    else:
        assert took == least < asis * (1 - LEAST_GAIN)


@settings(max_examples=examples(60), deadline=None)
@given(st.permutations([0, 0, 1, 1]))
def test_a_tensor_parallel_group_over_two_hosts_stays_in_one_rack(racks: list[int]) -> None:
    exchanges = host_exchanges(4, (4, 4), placed_in_order([2, 2, 2, 2]))
    order = order_hosts(exchanges, [2] * 4, [2] * 4, step(in_racks(racks), 2))
    assert racks[order[0]] == racks[order[1]]
    assert racks[order[2]] == racks[order[3]]


@settings(max_examples=examples(60), deadline=None)
@given(st.permutations([0] * 4 + [1] * 3 + [2] * 5))
def test_a_long_pipeline_leaves_each_rack_once(racks: list[int]) -> None:
    """There are too many hosts to try all orders."""
    count = len(racks)
    measured = step(in_racks(racks), count)
    order = order_hosts(
        host_exchanges(1, measured.layers, placed_in_order([1] * count)), [1] * count, [1] * count, measured
    )
    assert sorted(order) == list(range(count))
    changes = sum(racks[first] != racks[second] for first, second in pairwise(order))
    assert changes == 2


@settings(max_examples=examples(60), deadline=None)
@given(st.permutations(range(8)), st.lists(st.integers(1, 3), min_size=8, max_size=8))
def test_many_hosts_get_no_more_ranks_than_they_have_room_for(hosts: list[int], counts: list[int]) -> None:
    measured = step(in_racks([host % 2 for host in hosts]), sum(counts))
    exchanges = host_exchanges(1, measured.layers, placed_in_order(counts))
    order = order_hosts(exchanges, counts, counts, measured)
    assert sorted(order) == list(range(8))
    assert all(count <= counts[host] for count, host in zip(counts, order, strict=True))
    assert measured.seconds(exchanges, order) <= measured.seconds(exchanges, range(8))


def test_differences_of_a_few_percent_change_nothing() -> None:
    found = {pair: Link(100e-6 * (1 + 0.02 * sum(pair)), 1e9) for pair in combinations(range(3), 2)}
    measured = step(dict(reversed(found.items())), 3)
    exchanges = host_exchanges(1, measured.layers, placed_in_order([1, 1, 1]))
    assert order_hosts(exchanges, [1] * 3, [1] * 3, measured) == (0, 1, 2)


@settings(max_examples=examples(60), deadline=None)
@given(links, st.integers(1, 4096))
def test_an_all_reduce_takes_the_time_of_a_ring(link: Link, tokens: int) -> None:
    assume(link.bandwidth > 0)
    measured = MeasuredStep(HostLinks({(0, 1): link}), layers=(1,), stream_bytes=10, tokens=tokens)
    (reduces,) = host_exchanges(2, (1,), [(0,), (1,)])
    once = 2 * link.latency_s + 10 * tokens / link.bandwidth
    assert measured.seconds([reduces]) == pytest.approx(3 * once)  # after the embedding, attention and the MLP
