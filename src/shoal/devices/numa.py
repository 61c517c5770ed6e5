"""The NUMA nodes of a host: parts of its memory, and the cores that are near them. This module is free of torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NODES, STATUS = Path("sys/devices/system/node"), Path("proc/self/status")


@dataclass(frozen=True, slots=True)
class MemoryNode:
    """A NUMA node, as the kernel shows it."""

    number: int
    cores: tuple[int, ...] = ()
    memory: int | None = None  # in bytes; None: the kernel does not say
    distances: tuple[int, ...] = ()  # to the nodes of this host in their order, as the firmware states them
    usable: bool = True  # this process may use its memory, and it has some


def read_nodes(root: Path) -> tuple[MemoryNode, ...]:
    """Return the NUMA nodes that are online, by number. `root` has the folders proc and sys."""
    folders = {int(folder.name.removeprefix("node")): folder for folder in (root / NODES).glob("node[0-9]*")}
    online = read_list(_text(root / NODES / "online")) or tuple(folders)
    allowed = allowed_nodes(root) or online
    found = []
    for number in sorted(set(online) & set(folders)):
        memory = re.search(r"MemTotal:\s*(\d+) kB", _text(folders[number] / "meminfo"))
        size = int(memory[1]) * 1024 if memory else None
        found.append(
            MemoryNode(
                number=number,
                cores=read_list(_text(folders[number] / "cpulist")),
                memory=size,
                distances=tuple(map(int, _text(folders[number] / "distance").split())),
                usable=number in allowed and size != 0,
            )
        )
    return tuple(found)


def allowed_nodes(root: Path) -> tuple[int, ...]:
    """Return the numbers of the nodes whose memory this process may use; () if the kernel does not say."""
    match = re.search(r"^Mems_allowed_list:\s*(\S+)", _text(root / STATUS), re.MULTILINE)
    return read_list(match[1]) if match else ()


def read_list(text: str) -> tuple[int, ...]:
    """Return the numbers of a list of the kernel, such as 0-3,8-11."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found += range(int(first), int(last or first) + 1)
    return tuple(found)


def share_cores(cores: tuple[int, ...], ranks: int, nodes: Sequence[MemoryNode] = ()) -> tuple[tuple[int, ...], ...]:
    """Return the cores of each rank: its own, or with more ranks than cores the one core that it shares.

    Ranks get the same number of cores, or one more, and those of one node where they fit. Ranks that follow each other
    share a node as far as possible. The last ranks get what is left on all nodes.
    """
    groups = _by_node(cores, nodes)
    if ranks > len(cores):
        ordered = [core for group in groups for core in group]
        return tuple((ordered[rank % len(ordered)],) for rank in range(ranks))
    whole, rest = divmod(len(cores), ranks)
    sizes = [whole + (rank < rest) for rank in range(ranks)]
    shares: list[list[int]] = []
    left: list[int] = []
    for group in groups:
        taken = 0
        while len(shares) < ranks and taken + sizes[len(shares)] <= len(group):
            shares.append(group[taken : taken + sizes[len(shares)]])
            taken += len(shares[-1])
        left += group[taken:]
    for size in sizes[len(shares) :]:
        shares.append(left[:size])
        del left[:size]
    return tuple(map(tuple, shares))


def node_of(cores: Sequence[int], nodes: Sequence[MemoryNode]) -> int | None:
    """Return the number of the node that has all these cores; None if there is none, or its memory can't be used."""
    return next((node.number for node in nodes if node.usable and set(cores) <= set(node.cores)), None)


def _by_node(cores: tuple[int, ...], nodes: Sequence[MemoryNode]) -> list[list[int]]:
    """Return the cores of each node, in their order, and last those of no node."""
    groups = [[core for core in cores if core in node.cores] for node in nodes]
    known = {core for group in groups for core in group}
    return [*groups, [core for core in cores if core not in known]]


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""
