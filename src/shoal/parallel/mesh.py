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
    """`ep`: the ranks that hold a stage's experts together: a second view of its dp x tp ranks."""

    topology: Topology
    rank: int  # among the ranks of all replicas
    pp: Axis
    tp: Axis
    ep: Axis

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those that lead to other ranks."""
        axes = (self.pp, self.tp) if self.ep.comm is self.tp.comm else (self.pp, self.tp, self.ep)
        return tuple(axis for axis in axes if axis.size > 1)


def make_mesh(
    topology: Topology,
    rank: int,
    connect: Callable[[str, Sequence[int]], Communicator],
    *,
    expert_parallel: bool = False,
) -> Mesh:
    """`connect(axis, ranks)` opens the communicator of a group; it is asked only for groups of two and more.

    Ranks of different replicas are connected if the model is `expert_parallel`. A replica alone has its experts on its
    tensor-parallel ranks, and no group for them.
    """

    def axis(name: str, group: Sequence[int]) -> Axis:
        comm = connect(name, group) if len(group) > 1 else LocalComm()
        return Axis(name, group.index(rank), len(group), comm)

    tp = axis("tp", topology.group("tp", rank))
    across = expert_parallel and topology.size("dp") > 1
    return Mesh(
        topology,
        rank,
        pp=axis("pp", topology.group("pp", rank)),
        tp=tp,
        ep=axis("ep", topology.plane(("dp", "tp"), rank)) if across else Axis("ep", tp.rank, tp.size, tp.comm),
    )
