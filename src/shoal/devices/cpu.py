"""What a CPU host offers, read from the kernel. Free of torch."""

import contextlib
import math
import os
import zlib
from pathlib import Path

from shoal.devices.hardware import Hardware
from shoal.errors import ConfigError

ROOT = Path("/")
MEMORY, MEMBERSHIP, GROUPS = Path("proc/meminfo"), Path("proc/self/cgroup"), Path("sys/fs/cgroup")


def discover(num_devices: int | None = None, root: Path = ROOT) -> Hardware:
    """Counts each core as a device unless told otherwise; cores are shared by any number of ranks. Those count that
    this process may run on, and no more of them than its control groups give it time for.

    Args:
        root: where proc and sys/fs/cgroup are.

    Raises:
        ConfigError: the kernel does not say how much memory there is.
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
    )


def _limits(allowed: int, used: int, quota: float | None, root: Path) -> tuple[str, ...]:
    found = []
    if quota is not None and used < allowed:
        found.append(f"{used} of {allowed} CPU cores are used: the CPU quota of the control group is {quota:g}")
    if not (root / MEMORY).exists():
        found.append(f"{root / MEMORY} is not there: of available memory only what is free at all is counted")
    return tuple(found)


def _share(cores: tuple[int, ...], count: int, membership: str) -> tuple[int, ...]:
    """`count` neighbours, which all processes of one control group choose alike, and others perhaps differently: ranks
    are bound to them, and several containers on the first core would share it."""
    start = zlib.crc32(f"{os.uname().nodename} {membership}".encode()) % len(cores)
    return tuple(sorted((cores[start:] + cores[:start])[:count]))


def cpu_quota(root: Path = ROOT) -> float | None:
    """How many CPUs' time this process may use by the tightest of its control groups; None: as much as there is."""
    quotas = []
    for group in control_groups(_read(root / MEMBERSHIP), root / GROUPS, "cpu"):
        two = _read(group / "cpu.max").split()
        quota, period = two if len(two) == 2 else map(_read, (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"))
        with contextlib.suppress(ValueError):  # "max", or no such file
            if int(quota) > 0 and int(period) > 0:  # in version 1, -1 is no limit
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory(root: Path = ROOT) -> tuple[int, int]:
    """(total, available) bytes: the machine's, or the control group's where that is less.

    Raises:
        ConfigError: the kernel does not say.
    """
    total, available = _machine_memory(root)
    for group in control_groups(_read(root / MEMBERSHIP), root / GROUPS, "memory"):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        if limit is not None and limit < total:
            total = limit
            available = min(available, limit - _used(group))
    return total, max(available, 0)


def _machine_memory(root: Path) -> tuple[int, int]:
    """From /proc/meminfo, which is not there where proc is mounted with subset=pid (systemd's ProcSubset=pid)."""
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
            f"{root / MEMORY} can't be read, and nothing else says how much memory this host has: mount all of proc "
            "(systemd: ProcSubset=all)"
        )
    return total * page, free * page


def control_groups(membership: str, root: Path, controller: str) -> list[Path]:
    """The folders of this process's groups, innermost first: a limit of any of them counts.

    `membership` is /proc/self/cgroup: lines of `id:controllers:path`, without controllers for version 2. In a
    container the path may lead out of what is mounted; the mounted root is looked at in any case.
    """
    folders: list[Path] = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 has a folder for each set of controllers, with links by the name of each but in some containers.
        bases = [root] if not controllers else [root / name for name in dict.fromkeys((controller, controllers))]
        for base in bases:
            folder = base / path.lstrip("/")
            folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
    return folders


def _read(file: Path) -> str:
    """ "" where it can't be read."""
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


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
    """Bytes of this process that no file backs (RssAnon)."""
    for line in _read(Path("/proc/self/status")).splitlines():
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
