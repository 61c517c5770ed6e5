"""The cores and the memory that this process may use, as the kernel shows them. This module is free of torch."""

import contextlib
import math
import os
import zlib
from pathlib import Path

from shoal.devices import numa
from shoal.devices.hardware import Hardware
from shoal.errors import ConfigError

ROOT = Path("/")
MEMORY, MEMBERSHIP, GROUPS = Path("proc/meminfo"), Path("proc/self/cgroup"), Path("sys/fs/cgroup")


def discover(num_devices: int | None = None, root: Path = ROOT) -> Hardware:
    """Return the hardware of a CPU host, on which any number of ranks may share a core.

    The cores are those on which this process may run, reduced to the CPU quota of its control groups.

    Args:
        num_devices: the number of devices; by default each core counts as one.
        root: the folder that contains proc and sys/fs/cgroup.

    Raises:
        ConfigError: the kernel does not show the size of the memory.
    """
    allowed = tuple(sorted(os.sched_getaffinity(0)))
    quota = cpu_quota(root)
    cores = allowed if quota is None else _share(allowed, max(1, math.floor(quota)), _read(root / MEMBERSHIP))
    total, available = memory(root)
    return Hardware(
        device="cpu",
        num_devices=num_devices or len(cores),
        cores=cores,
        host_memory=total,
        host_memory_available=available,
        device_memory=None,
        devices_shareable=num_devices is None,
        limits=_limits(len(allowed), len(cores), quota, root),
        nodes=_nodes(cores, root),
    )


def _nodes(cores: tuple[int, ...], root: Path) -> tuple[numa.MemoryNode, ...]:
    """Return the NUMA nodes with these cores; none if the host has only one node."""
    nodes = numa.read_nodes(root)
    return tuple(node for node in nodes if set(node.cores) & set(cores)) if len(nodes) > 1 else ()


def _limits(allowed: int, used: int, quota: float | None, root: Path) -> tuple[str, ...]:
    found = []
    if quota is not None and used < allowed:
        found.append(f"{used} of {allowed} CPU cores are used: the CPU quota of the control group is {quota:g}")
    if not (root / MEMORY).exists():
        found.append(f"{root / MEMORY} does not exist: only free memory counts as available, not reclaimable memory")
    return tuple(found)


def _share(cores: tuple[int, ...], count: int, membership: str) -> tuple[int, ...]:
    """Choose `count` neighbouring cores by a hash of the control group.

    All processes of a control group choose the same cores, and other groups probably others. Ranks are bound to their
    cores, so several containers that all chose the first core would have to share it.
    """
    start = zlib.crc32(f"{os.uname().nodename} {membership}".encode()) % len(cores)
    return tuple(sorted((cores[start:] + cores[:start])[:count]))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the lowest CPU quota of this process's control groups, in CPUs; None if there is no limit."""
    quotas = []
    for group in control_groups(_read(root / MEMBERSHIP), root / GROUPS, "cpu"):
        two = _read(group / "cpu.max").split()
        quota, period = two if len(two) == 2 else map(_read, (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"))
        with contextlib.suppress(ValueError):  # "max", or the file does not exist
            if int(quota) > 0 and int(period) > 0:  # in version 1, -1 means no limit
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory(root: Path = ROOT) -> tuple[int, int]:
    """Return total and available memory in bytes: of the machine, or of the control group if that has less.

    Raises:
        ConfigError: the kernel does not show it.
    """
    total, available = _machine_memory(root)
    for group in control_groups(_read(root / MEMBERSHIP), root / GROUPS, "memory"):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        if limit is not None and limit < total:
            total = limit
            available = min(available, limit - _used(group))
    return total, max(available, 0)


def _machine_memory(root: Path) -> tuple[int, int]:
    """Return the machine's total and available memory in bytes.

    /proc/meminfo has both, but is missing if proc is mounted with subset=pid (systemd's ProcSubset=pid).
    """
    try:
        info = dict(line.split(":", 1) for line in (root / MEMORY).read_text().splitlines())
        return int(info["MemTotal"].split()[0]) * 1024, int(info["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, LookupError):
        pass
    try:
        page, total, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    except (OSError, ValueError):
        total = free = -1
    if total <= 0 or free < 0:
        raise ConfigError(
            f"{root / MEMORY} can't be read, and nothing else shows how much memory this host has: mount all of proc "
            "(systemd: ProcSubset=all)"
        )
    return total * page, free * page


def control_groups(membership: str, root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's control groups, innermost first. The limits of all of them apply.

    `membership` is the content of /proc/self/cgroup: lines of `id:controllers:path`, without controllers for version 2.
    In a container the path may not exist in the mounted hierarchy; the mounted root is always included.
    """
    folders: list[Path] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 has a folder for each set of controllers, and usually a link with the name of each controller.
        bases = [root] if not controllers else [root / name for name in dict.fromkeys((controller, controllers))]
        for base in bases:
            folder = base / path.lstrip("/")
            folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
    return folders


def _read(file: Path) -> str:
    """Return the text of a file, or "" if it can't be read."""
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


def _used(group: Path) -> int:
    """Return the bytes of a control group that are not reclaimable: without file pages that the kernel would drop."""
    used = _number(group / "memory.current", group / "memory.usage_in_bytes") or 0
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return used
    inactive, active = (stat.get(f"total_{name}", stat.get(name, "0")) for name in ("inactive_file", "active_file"))
    return used - int(inactive) - int(active)


def _number(*files: Path) -> int | None:
    """Return the number in the first file that contains one, or None ("max" means no limit)."""
    for file in files:
        try:
            return int(file.read_text())
        except (OSError, ValueError):
            continue
    return None


def anonymous_memory() -> int:
    """Return this process's anonymous memory (RssAnon) in bytes: memory that no file backs."""
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def pinning_environment(cores: tuple[int, ...]) -> dict[str, str]:
    """Return environment variables that bind each OpenMP thread to a core of its own. torch reads them when it loads.

    Without them two threads of a matrix product share a core so often that it may take ten times as long.
    """
    return {"GOMP_CPU_AFFINITY": " ".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}
