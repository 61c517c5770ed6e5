"""Cores, memory and NUMA nodes, with the limits of control groups."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.devices import cpu, numa
from shoal.devices.hardware import Hardware
from shoal.doctor.kinds import failure, ok, warning
from shoal.values import format_bytes
from shoal.wire.doctor import Finding
from shoal.wire.topology import NumaNode

_LEAST_MEMORY, _LITTLE_MEMORY = 1 << 30, 4 << 30


@dataclass(frozen=True, slots=True)
class CoreFacts:
    """The cores and the memory that this process may use."""

    hardware: Hardware
    machine_cores: int
    allowed_cores: tuple[int, ...]  # by the affinity of this process
    quota: float | None  # of the control groups, in cores
    allowed_nodes: tuple[int, ...]  # the NUMA nodes whose memory may be used; () if the kernel does not say
    nodes: tuple[NumaNode, ...] = ()
    machine_memory: int | None = None  # in bytes; None if the kernel does not show it


def gather(root: Path = cpu.ROOT) -> CoreFacts:
    """Return the cores and the memory. `root` has the folders proc and sys."""
    return CoreFacts(
        hardware=cpu.discover(root=root),
        machine_cores=os.cpu_count() or 1,
        allowed_cores=tuple(sorted(os.sched_getaffinity(0))),
        quota=cpu.cpu_quota(root),
        allowed_nodes=numa.allowed_nodes(root),
        nodes=tuple(
            NumaNode(number=node.number, cores=node.cores, memory=node.memory, distances=node.distances)
            for node in numa.read_nodes(root)
        ),
        machine_memory=_machine_memory(root),
    )


def _machine_memory(root: Path) -> int | None:
    match = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / cpu.MEMORY), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""


def check(facts: CoreFacts) -> list[Finding]:
    return [check_cores(facts), check_memory(facts), check_numa(facts)]


def check_cores(facts: CoreFacts) -> Finding:
    used, machine = len(facts.hardware.cores), facts.machine_cores
    if facts.quota is not None and facts.quota < len(facts.allowed_cores):
        return warning("cores", f"{used} of {machine} cores: a control group has a CPU quota of {facts.quota:g} cores")
    if used < machine:
        return warning(
            "cores", f"{used} of {machine} cores: this process is bound to cores {short_list(facts.allowed_cores)}"
        )
    return ok("cores", f"{used} cores")


def check_memory(facts: CoreFacts) -> Finding:
    free, total = facts.hardware.host_memory_available, facts.hardware.host_memory
    text = f"{format_bytes(free)} of {format_bytes(total)} are available"
    if facts.machine_memory and total < facts.machine_memory:
        text += f" (a control group limits it, the machine has {format_bytes(facts.machine_memory)})"
    if free < _LEAST_MEMORY:
        return failure("memory", f"{text}, less than {format_bytes(_LEAST_MEMORY)}")
    return warning("memory", f"{text}, which is little for a model") if free < _LITTLE_MEMORY else ok("memory", text)


def check_numa(facts: CoreFacts) -> Finding:
    nodes = [node for node in facts.nodes if set(node.cores) & set(facts.allowed_cores)]
    far = [node.number for node in nodes if facts.allowed_nodes and node.number not in facts.allowed_nodes]
    if far:
        numbers = short_list(tuple(far))
        return warning("numa", f"this process has cores of NUMA node {numbers}, but may not use its memory")
    bare = [node.number for node in nodes if node.memory == 0]
    if bare and len(facts.nodes) > 1:
        return warning("numa", f"NUMA node {short_list(tuple(bare))} has cores but no memory")
    if len(facts.nodes) <= 1:
        return ok("numa", "one NUMA node")
    return ok("numa", f"{len(facts.nodes)} NUMA nodes, cores of {len(nodes)} may be used")


def short_list(numbers: Sequence[int]) -> str:
    """Return numbers as the kernel writes them: 0-3,8-11."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
