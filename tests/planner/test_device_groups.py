"""The devices and cores that the tensor-parallel groups of a host get."""

from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.planner.device_groups import (
    Distance,
    distances,
    group_devices,
    group_sizes,
    visible_devices,
)
from shoal.wire.topology import Device, DeviceLink, HostTopology
from support.example_counts import examples

DEVICES = tuple(Device(index=i, uuid=f"GPU-{i}f00", numa=i // 2) for i in range(4))
# Devices 0 and 3, and 1 and 2, have NVLink; the others reach each other over the connection of two processors.
CROSSED = HostTopology(
    name="h",
    devices=DEVICES,
    links=tuple(
        DeviceLink(first=i, second=j, kind="nvlink", path="NV4", links=4)
        if i + j == 3
        else DeviceLink(first=i, second=j, kind="pcie", path="SYS")
        for i, j in combinations(range(4), 2)
    ),
)


def longest_distances(order: tuple[int, ...], sizes: list[int], distance: Distance) -> float:
    """Return the sum of the longest distance in each group."""
    total, first = 0.0, 0
    for size in sizes:
        group = order[first : first + size]
        total += max((distance(*pair) for pair in combinations(group, 2)), default=0.0)
        first += size
    return total


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_no_other_grouping_of_a_few_devices_is_better(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4).filter(lambda each: sum(each) <= count))
    table = {frozenset(pair): data.draw(st.sampled_from([1.0, 2.0, 5.0])) for pair in combinations(range(count), 2)}

    def distance(first: int, second: int) -> float:
        return table[frozenset((first, second))]

    order = group_devices(sizes, count, distance)
    assert sorted(order) == list(range(count))
    best = min(longest_distances(each, sizes, distance) for each in permutations(range(count)))
    assert longest_distances(order, sizes, distance) == best


@settings(max_examples=examples(60), deadline=None)
@given(st.permutations([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4))
def test_sixteen_devices_are_grouped_by_switch(switches: list[int]) -> None:
    """There are too many devices to try all groups."""
    order = group_devices([4] * 4, 16, lambda one, other: 1.0 if switches[one] == switches[other] else 9.0)
    assert sorted(order) == list(range(16))
    assert all(len({switches[device] for device in order[i : i + 4]}) == 1 for i in range(0, 16, 4))


def test_equal_links_leave_the_devices_in_order() -> None:
    assert group_devices([2, 2, 2, 2], 8, lambda *_: 1.0) == tuple(range(8))
    assert group_devices([8, 8], 16, lambda *_: 1.0) == tuple(range(16))


def test_devices_with_nvlink_share_a_group() -> None:
    assert group_devices([2, 2], 4, distances(CROSSED, DEVICES)) == (0, 3, 1, 2)
    assert group_devices([4], 4, distances(CROSSED, DEVICES)) == (0, 1, 2, 3)


def test_of_equal_ways_the_one_within_a_numa_node_is_taken() -> None:
    host = HostTopology(name="h", devices=tuple(Device(index=i, numa=i % 2) for i in range(4)))
    assert group_devices([2, 2], 4, distances(host, host.devices)) == (0, 2, 1, 3)


def test_the_ranks_of_a_host_by_tensor_parallel_group() -> None:
    assert group_sizes((0, 1, 2, 3), 2) == [2, 2]
    assert group_sizes((1, 2, 3), 2) == [1, 2]
    assert group_sizes((0, 1, 4, 5), 4) == [2, 2]


@pytest.mark.parametrize(
    ("names", "count", "indices"),
    [
        ((), 4, [0, 1, 2, 3]),
        ((), 2, [0, 1]),
        (("3", "1"), 2, [3, 1]),
        (("GPU-2f00", "GPU-0f"), 2, [2, 0]),
        (("3", "1"), 3, []),  # a third one that was not measured
        (("7", "1"), 2, []),
        ((), 8, []),
    ],
)
def test_devices_are_numbered_as_cuda_shows_them(names: tuple[str, ...], count: int, indices: list[int]) -> None:
    assert [device.index for device in visible_devices(CROSSED, names, count)] == indices
