"""Cores, memory and NUMA nodes, with recorded files of the kernel."""

import dataclasses
from collections.abc import Sequence

import pytest

from shoal.devices.hardware import Hardware
from shoal.doctor import cores
from shoal.doctor.cores import CoreFacts
from shoal.wire.topology import NumaNode
from support.recorded_host import Tree

GIB = 1 << 30


def facts(
    used: int = 8,
    machine: int = 8,
    allowed: Sequence[int] = range(8),
    quota: float | None = None,
    available: int = 16 * GIB,
    nodes: tuple[NumaNode, ...] = (),
    allowed_nodes: tuple[int, ...] = (),
) -> CoreFacts:
    hardware = Hardware(
        device="cpu",
        num_devices=used,
        cores=tuple(range(used)),
        host_memory=32 * GIB,
        host_memory_available=available,
        device_memory=None,
        devices_shareable=True,
    )
    return CoreFacts(hardware, machine, tuple(allowed), quota, allowed_nodes, nodes)


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        (facts(), "ok", "8 cores"),
        (facts(used=2, quota=2.5), "warning", "2 of 8 cores: a control group has a CPU quota of 2.5 cores"),
        (facts(used=3, allowed=(0, 1, 4)), "warning", "bound to cores 0-1,4"),
        (facts(quota=16), "ok", "8 cores"),
    ],
)
def test_cores(found: CoreFacts, level: str, words: str) -> None:
    finding = cores.check_cores(found)
    assert (finding.level, words in finding.text) == (level, True)


@pytest.mark.parametrize(
    ("available", "level"), [(4 * GIB, "ok"), (4 * GIB - 1, "warning"), (GIB, "warning"), (GIB - 1, "failure")]
)
def test_memory(available: int, level: str) -> None:
    assert cores.check_memory(facts(available=available)).level == level


def test_memory_that_a_control_group_limits() -> None:
    limited = dataclasses.replace(facts(), machine_memory=64 * GIB)
    assert "a control group limits it, the machine has 64.00 GiB" in cores.check_memory(limited).text
    assert "control group" not in cores.check_memory(dataclasses.replace(facts(), machine_memory=32 * GIB)).text


NEAR = NumaNode(number=0, cores=(0, 1, 2, 3), memory=16 * GIB, distances=(10, 21))
FAR = NumaNode(number=1, cores=(4, 5, 6, 7), memory=16 * GIB, distances=(21, 10))


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        (facts(nodes=(NEAR,)), "ok", "one NUMA node"),
        (facts(nodes=(NEAR, FAR), allowed_nodes=(0, 1)), "ok", "2 NUMA nodes, cores of 2"),
        (facts(nodes=(NEAR, FAR), allowed=range(4), allowed_nodes=(0,)), "ok", "cores of 1 may be used"),
        (facts(nodes=(NEAR, FAR), allowed_nodes=(0,)), "warning", "cores of NUMA node 1, but may not use its memory"),
        (facts(nodes=(NEAR, NumaNode(number=1, cores=(4,), memory=0))), "warning", "NUMA node 1 has cores but no"),
    ],
)
def test_numa(found: CoreFacts, level: str, words: str) -> None:
    finding = cores.check_numa(found)
    assert (finding.level, words in finding.text) == (level, True)


def test_nodes_and_quotas_come_from_the_files_of_the_kernel(tree: Tree) -> None:
    root = tree(
        {
            "proc/meminfo": f"MemTotal: {2**25} kB\nMemAvailable: {2**24} kB\n",
            "proc/self/cgroup": "0::/pod\n",
            "proc/self/status": "Cpus_allowed_list:\t0-7\nMems_allowed_list:\t0\n",
            "sys/fs/cgroup/pod/cpu.max": "50000 100000\n",
            "sys/devices/system/node/node1/cpulist": "4-6,8\n",
            "sys/devices/system/node/node1/meminfo": "Node 1 MemTotal:       1024 kB\nNode 1 MemFree: 1 kB\n",
            "sys/devices/system/node/node1/distance": "21 10\n",
            "sys/devices/system/node/node0/cpulist": "0-3\n",
            "sys/devices/system/node/online": "0-1\n",
        }
    )
    found = cores.gather(root)
    assert found.nodes == (
        NumaNode(number=0, cores=(0, 1, 2, 3)),
        NumaNode(number=1, cores=(4, 5, 6, 8), memory=2**20, distances=(21, 10)),
    )
    assert (found.quota, found.allowed_nodes) == (0.5, (0,))
    assert len(found.hardware.cores) == 1
    assert found.hardware.host_memory_available == 2**34
