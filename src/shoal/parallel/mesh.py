"""A rank's place among the others, handed to whoever is split; nobody asks a global."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.comm.base import Communicator
from shoal.comm.local import LocalComm
from shoal.parallel.topology import Topology


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of the grid as one rank sees it. A size of 1 carries a LocalComm."""

    name: str
    rank: int
    size: int
    comm: Communicator


@dataclass(frozen=True, slots=True)
class Mesh:
    topology: Topology
    rank: int
    tp: Axis


def make_mesh(topology: Topology, rank: int, connect: Callable[[str, Sequence[int]], Communicator]) -> Mesh:
    """`connect(axis, ranks)` opens the communicator of a group; it is asked only for groups of two and more."""

    def axis(name: str) -> Axis:
        group = topology.group(name, rank)
        comm = connect(name, group) if len(group) > 1 else LocalComm()
        return Axis(name, group.index(rank), len(group), comm)

    return Mesh(topology, rank, axis("tp"))
