"""NUMA nodes from recorded files of the kernel, and how ranks share their cores and their memory."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.devices import cpu
from shoal.devices.memory_policy import prefer_memory_of
from shoal.devices.numa import MemoryNode, node_of, read_nodes, share_cores
from support.example_counts import examples
from support.recorded_host import write_tree

NODES = "sys/devices/system/node"
SMT = {0: "0-3,8-11", 1: "4-7,12-15"}  # two nodes of four cores with two threads each


def recorded_nodes(
    root: Path, cores: Mapping[int, str], *, memory: Mapping[int, int] | None = None, online: str = "", status: str = ""
) -> Path:
    """Write the files of a host with these cores on each node. `memory`: in KiB, where it is not 1 GiB."""
    files = {"proc/meminfo": "MemTotal: 4194304 kB\nMemAvailable: 4194304 kB\n", "proc/self/status": status}
    if online:
        files[f"{NODES}/online"] = f"{online}\n"
    for number, each in cores.items():
        size = (memory or {}).get(number, 2**20)
        files[f"{NODES}/node{number}/cpulist"] = f"{each}\n"
        files[f"{NODES}/node{number}/meminfo"] = f"Node {number} MemTotal: {size} kB\n"
    return write_tree(root, files)


def test_nodes_with_two_threads_for_each_core(tmp_path: Path) -> None:
    near, far = read_nodes(recorded_nodes(tmp_path, SMT, online="0-1"))
    assert near == MemoryNode(0, (0, 1, 2, 3, 8, 9, 10, 11), 2**30)
    assert (far.number, far.cores, far.usable) == (1, (4, 5, 6, 7, 12, 13, 14, 15), True)


def test_a_node_that_is_offline_is_left_out(tmp_path: Path) -> None:
    root = recorded_nodes(tmp_path, {0: "0-3", 1: "", 2: "4-7"}, online="0,2")
    assert [node.number for node in read_nodes(root)] == [0, 2]


@pytest.mark.parametrize(
    ("memory", "status"),
    [({1: 0}, ""), ({}, "Mems_allowed_list:\t0\n")],
    ids=["without memory", "memory not allowed by the control group"],
)
def test_cores_of_a_node_whose_memory_cannot_be_used(memory: dict[int, int], status: str, tmp_path: Path) -> None:
    """Ranks get its cores, but prefer the memory of no node."""
    nodes = read_nodes(recorded_nodes(tmp_path, SMT, memory=memory, status=status))
    assert [node.usable for node in nodes] == [True, False]
    near, far = share_cores(tuple(range(16)), 2, nodes)
    assert (near, far) == (nodes[0].cores, nodes[1].cores)
    assert (node_of(near, nodes), node_of(far, nodes)) == (0, None)


@pytest.mark.parametrize(
    ("allowed", "cores", "found"),
    [
        ({0, 1, 12, 13}, SMT, [(0, (0, 1)), (1, (12, 13))]),
        ({4, 5}, SMT, [(1, (4, 5))]),
        ({0, 1}, {0: "0-1"}, []),
        ({0, 1}, {0: "0-1", 1: ""}, [(0, (0, 1))]),  # a node with memory only
    ],
)
def test_the_hardware_has_the_nodes_of_the_cores_that_may_be_used(
    allowed: set[int],
    cores: dict[int, str],
    found: list[tuple[int, tuple[int, ...]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a control group with a set of cores. A host with one node has none, so nothing is placed there."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    hardware = cpu.discover(root=recorded_nodes(tmp_path, cores))
    ours = [(node.number, tuple(core for core in node.cores if core in allowed)) for node in hardware.nodes]
    assert (hardware.cores, ours) == (tuple(sorted(allowed)), found)


def nodes_of(*cores: tuple[int, ...]) -> list[MemoryNode]:
    return [MemoryNode(number, each) for number, each in enumerate(cores)]


@pytest.mark.parametrize(
    ("cores", "ranks", "nodes", "shares"),
    [
        ((2, 3, 5, 7, 8), 2, [], [(2, 3, 5), (7, 8)]),
        ((2, 3), 3, [], [(2,), (3,), (2,)]),
        ((0, 1, 2, 3), 2, nodes_of((0, 2), (1, 3)), [(0, 2), (1, 3)]),
        ((0, 1, 2, 3), 1, nodes_of((0, 2), (1, 3)), [(0, 2, 1, 3)]),
        ((0, 1, 2, 3), 5, nodes_of((0, 2), (1, 3)), [(0,), (2,), (1,), (3,), (0,)]),
        # Of three ranks the last one gets what the others have left on both nodes.
        (tuple(range(8)), 3, nodes_of((0, 1, 2, 3), (4, 5, 6, 7)), [(0, 1, 2), (4, 5, 6), (3, 7)]),
        # Nodes of two and of six cores: the first rank does not fit on the first node.
        (tuple(range(8)), 2, nodes_of((0, 1), (2, 3, 4, 5, 6, 7)), [(2, 3, 4, 5), (0, 1, 6, 7)]),
        # Four nodes for two ranks: each has two whole nodes.
        (tuple(range(8)), 2, nodes_of((0, 4), (1, 5), (2, 6), (3, 7)), [(0, 4, 1, 5), (2, 6, 3, 7)]),
    ],
)
def test_ranks_share_out_the_cores(
    cores: tuple[int, ...], ranks: int, nodes: list[MemoryNode], shares: list[tuple[int, ...]]
) -> None:
    assert list(share_cores(cores, ranks, nodes)) == shares


@settings(max_examples=examples(100), deadline=None)
@given(st.sets(st.integers(0, 23), min_size=1), st.integers(1, 30), st.integers(1, 4))
def test_each_rank_has_its_share_of_one_node_if_it_fits(allowed: set[int], ranks: int, count: int) -> None:
    cores, nodes = tuple(sorted(allowed)), nodes_of(*(tuple(range(node, 20, count)) for node in range(count)))
    shares, plain = share_cores(cores, ranks, nodes), share_cores(cores, ranks)
    assert sorted(map(len, shares)) == sorted(map(len, plain))
    assert {core for share in shares for core in share} == (set(cores) if ranks <= len(cores) else set(sum(plain, ())))
    if ranks <= len(cores):
        scattered = [core for share in shares if node_of(share, nodes) is None for core in share]
        largest = max(map(len, shares))
        for node in nodes:
            assert len(set(scattered) & set(node.cores)) < largest, "another rank would have fitted on this node"
    if count == 1 and max(cores) < 20:
        assert shares == plain


def test_memory_is_preferred_from_a_node() -> None:
    """In a thread of its own, whose policy ends with it. Containers may forbid the call, and kernels may lack it."""
    found: list[str] = []

    def prefer() -> None:
        node = max(read_nodes(cpu.ROOT), key=lambda each: each.usable, default=MemoryNode(0)).number
        refused = prefer_memory_of(node)
        maps = Path("/proc/thread-self/numa_maps")
        found.append(refused or (f"prefer:{node}" if f"prefer:{node}" in maps.read_text() else maps.read_text()))
        found.append(prefer_memory_of(5000))

    thread = threading.Thread(target=prefer)
    thread.start()
    thread.join()
    first, absent = found
    assert first.startswith("prefer:") or first in ("Operation not permitted", "Function not implemented")
    assert absent
