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
    for group in control_groups(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        if limit is not None and limit < total:
            total = limit
            available = min(available, limit - _used(group))
    return total, max(available, 0)


def control_groups(membership: str, root: Path) -> list[Path]:
    """The folders of this process's memory groups, innermost first: a limit of any of them counts.

    `membership` is /proc/self/cgroup: lines of `id:controllers:path`, without controllers for version 2. In a
    container the path may lead out of what is mounted; the mounted root is looked at in any case.
    """
    folders: list[Path] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        folder = base / path.lstrip("/")
        folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
    return folders


def _used(group: Path) -> int:
    """Bytes of a group that can't be had back: file pages that the kernel would drop are not counted."""
    used = _number(group / "memory.current", group / "memory.usage_in_bytes") or 0
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return used
    inactive, active = (stat.get(f"total_{name}", stat.get(name, "0")) for name in ("inactive_file", "active_file"))
    return used - int(inactive) - int(active)


def _number(*files: Path) -> int | None:
    """What the first of the files that can be read says, None for "max"."""
    for file in files:
        try:
            return int(file.read_text())
        except (OSError, ValueError):
            continue
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
