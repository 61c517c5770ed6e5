"""What a CPU host offers, read from the kernel. Free of torch."""

import os
from pathlib import Path

from shoal.types import Hardware


def discover(num_devices: int | None = None) -> Hardware:
    """Counts each core as a device unless told otherwise; cores are shared by any number of ranks."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    total, available = memory()
    return Hardware(
        device="cpu",
        num_devices=num_devices or len(cores),
        cores=cores,
        host_memory=total,
        host_memory_available=available,
        device_memory=None,
        devices_shareable=num_devices is None,
    )


def memory() -> tuple[int, int]:
    """(total, available) bytes: the machine's, or the control group's where that is less."""
    info = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total = int(info["MemTotal"].split()[0]) * 1024
    available = int(info["MemAvailable"].split()[0]) * 1024
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and limit < total:
        total = limit
        available = min(available, limit - (used or 0))
    return total, max(available, 0)


def _cgroup_bytes(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def anonymous_memory() -> int:
    """Bytes of this process that no file backs (RssAnon): mapped checkpoints do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def cores_of_rank(cores: tuple[int, ...], rank: int, ranks: int) -> tuple[int, ...]:
    """The cores that a rank keeps to itself; with more ranks than cores, the one core it shares."""
    if ranks > len(cores):
        return (cores[rank % len(cores)],)
    whole, rest = divmod(len(cores), ranks)
    start = rank * whole + min(rank, rest)
    return cores[start : start + whole + (rank < rest)]


def pinning(cores: tuple[int, ...]) -> dict[str, str]:
    """Variables that bind each OpenMP thread to a core of its own; read when torch is loaded.

    Unbound, two threads of one matrix product end up on the same core often enough to cost a factor of ten.
    """
    return {"GOMP_CPU_AFFINITY": " ".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}
