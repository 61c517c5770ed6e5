"""Checks of /dev/shm, open files, processes and locked memory with made-up numbers."""

from pathlib import Path

import pytest

from shoal.doctor import limits
from shoal.doctor.limits import SharedMemory
from support.recorded_host import Tree

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("found", "ranks", "gpus", "level", "words"),
    [
        (SharedMemory(8 * GIB, 8 * GIB), 2, 8, "ok", "8.00 GiB of 8.00 GiB are free"),
        (SharedMemory(64 * MIB, 64 * MIB), 2, 0, "warning", "less than 1.00 GiB"),
        (SharedMemory(64 * MIB, 64 * MIB), 2, 2, "failure", "too little for NCCL with 2 GPUs"),
        (SharedMemory(8 * GIB, 20 * MIB), 2, 0, "failure", "2 ranks need 32.00 MiB"),
        (SharedMemory(64 * MIB, 60 * MIB), 8, 0, "failure", "8 ranks need 128.00 MiB"),
        (SharedMemory(exists=False), 2, 0, "failure", "does not exist"),
    ],
)
def test_shared_memory(found: SharedMemory, ranks: int, gpus: int, level: str, words: str) -> None:
    finding = limits.check_shared_memory(found, ranks, gpus)
    assert (finding.kind, finding.level) == ("shared-memory", level)
    assert words in finding.text
    assert bool(finding.mend) is (level != "ok")


@pytest.mark.parametrize(
    ("limit", "level"), [(None, "ok"), (65536, "ok"), (4095, "warning"), (1024, "warning"), (1023, "failure")]
)
def test_open_files(limit: int | None, level: str) -> None:
    assert limits.check_open_files(limit).level == level


@pytest.mark.parametrize(("limit", "level"), [(None, "ok"), (2048, "ok"), (2047, "warning")])
def test_processes(limit: int | None, level: str) -> None:
    assert limits.check_processes(limit).level == level


@pytest.mark.parametrize(("limit", "level"), [(None, "ok"), (64 * MIB, "ok"), (8 * MIB, "failure")])
def test_locked_memory_counts_only_with_rdma(limit: int | None, level: str) -> None:
    assert limits.check_locked_memory(limit).level == level
    some = limits.Limits(SharedMemory(GIB, GIB), None, None, limit)
    kinds = [[finding.kind for finding in limits.check(some, 2, 0, rdma=rdma)] for rdma in (False, True)]
    assert [("locked-memory" in each) for each in kinds] == [False, True]


def test_limits_come_from_the_folders_of_the_kernel(tree: Tree) -> None:
    root = tree({"proc/self/cgroup": "0::/pod/job\n", "sys/fs/cgroup/pod/pids.max": "100\n", "dev/shm/x": ""})
    found = limits.gather(root)
    assert found.processes == 100
    assert found.shared_memory.exists
    assert found.shared_memory.total > 0


def test_a_host_without_shared_memory(tmp_path: Path) -> None:
    assert not limits.gather(tmp_path).shared_memory.exists
