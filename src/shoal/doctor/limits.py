"""The limits of this process: /dev/shm, open files, processes, locked memory."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from shoal.devices import cpu
from shoal.doctor.kinds import failure, ok, warning
from shoal.values import format_bytes
from shoal.wire.doctor import Finding

SHM = Path("dev/shm")
_SHM_RANK = 16 << 20  # what NCCL takes in /dev/shm for each rank, at least
_SHM_DOCKER = 64 << 20  # the size that Docker gives it; too small for several GPUs
_SHM_COMFORTABLE = 1 << 30
_LEAST_FILES, _FEW_FILES = 1024, 4096
_FEW_PROCESSES = 2048
_LOCKED = 64 << 20


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """The size of /dev/shm in bytes. `exists`: there is such a folder, and it can be written."""

    total: int = 0
    free: int = 0
    exists: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of this process. None: there is no limit."""

    shared_memory: SharedMemory
    open_files: int | None  # the hard limit, to which Shoal raises the soft one
    processes: int | None
    locked_memory: int | None  # bytes


def gather(root: Path = cpu.ROOT) -> Limits:
    """Return the limits of this process. `root` has the folders dev, proc and sys."""
    return Limits(
        shared_memory=_shared_memory(root / SHM),
        open_files=_hard(resource.RLIMIT_NOFILE),
        processes=_least(_hard(resource.RLIMIT_NPROC), _most_of_groups(root)),
        locked_memory=_hard(resource.RLIMIT_MEMLOCK),
    )


def _shared_memory(folder: Path) -> SharedMemory:
    try:
        found = os.statvfs(folder)
    except OSError:
        return SharedMemory(exists=False)
    size = found.f_frsize
    return SharedMemory(found.f_blocks * size, found.f_bavail * size, os.access(folder, os.W_OK | os.X_OK))


def _hard(limit: int) -> int | None:
    _, hard = resource.getrlimit(limit)
    return None if hard == resource.RLIM_INFINITY else hard


def _most_of_groups(root: Path) -> int | None:
    """Return the least `pids.max` of this process's control groups."""
    try:
        membership = (root / cpu.MEMBERSHIP).read_text()
    except OSError:
        return None
    found: int | None = None
    for group in cpu.control_groups(membership, root / cpu.GROUPS, "pids"):
        try:
            found = _least(found, int((group / "pids.max").read_text()))
        except (OSError, ValueError):  # there is no such file, or no limit ("max")
            continue
    return found


def _least(*numbers: int | None) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def check(limits: Limits, ranks: int, num_gpus: int, *, rdma: bool) -> list[Finding]:
    """Check the limits for `ranks` ranks. `rdma`: this host has an active RDMA port."""
    found = [
        check_shared_memory(limits.shared_memory, ranks, num_gpus),
        check_open_files(limits.open_files),
        check_processes(limits.processes),
    ]
    return [*found, *([check_locked_memory(limits.locked_memory)] if rdma else [])]


def check_shared_memory(found: SharedMemory, ranks: int, num_gpus: int) -> Finding:
    if not found.exists:
        return failure("shared-memory", "/dev/shm does not exist or cannot be written", "mount -t tmpfs shm /dev/shm")
    size = f"{format_bytes(found.free)} of {format_bytes(found.total)} are free"
    needed = _SHM_RANK * max(ranks, num_gpus)
    if found.free < needed:
        return failure("shared-memory", f"{size}, {max(ranks, num_gpus)} ranks need {format_bytes(needed)}")
    if num_gpus > 1 and found.free <= _SHM_DOCKER:
        return failure("shared-memory", f"{size}, too little for NCCL with {num_gpus} GPUs")
    if found.free < _SHM_COMFORTABLE:
        return warning("shared-memory", f"{size}, less than {format_bytes(_SHM_COMFORTABLE)}")
    return ok("shared-memory", size)


def check_open_files(limit: int | None) -> Finding:
    if limit is None:
        return ok("open-files", "no limit")
    if limit < _LEAST_FILES:
        return failure("open-files", f"at most {limit} files may be open, Shoal needs {_LEAST_FILES}")
    if limit < _FEW_FILES:
        return warning("open-files", f"at most {limit} files may be open: enough for about {limit // 2} clients")
    return ok("open-files", f"up to {limit} files")


def check_processes(limit: int | None) -> Finding:
    if limit is not None and limit < _FEW_PROCESSES:
        return warning("processes", f"at most {limit} processes and threads may run, {_FEW_PROCESSES} are usual")
    return ok("processes", "no limit" if limit is None else f"up to {limit} processes and threads")


def check_locked_memory(limit: int | None) -> Finding:
    if limit is not None and limit < _LOCKED:
        return failure("locked-memory", f"at most {format_bytes(limit)} may be locked, and this host has RDMA")
    return ok("locked-memory", "no limit" if limit is None else f"up to {format_bytes(limit)}")
