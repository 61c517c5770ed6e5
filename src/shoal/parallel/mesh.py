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
    """`ep`: the ranks that hold a stage's experts together: a second view of its dp x tp ranks.

    `back`: the first and the last stage's rank of `pp`, between which drawn tokens travel. It is a group of its own,
    since a GPU's backend does what two ranks say to each other in one order for both directions; between stages there
    is nobody in it.
    """

    topology: Topology
    rank: int  # among the ranks of all replicas
    pp: Axis
    tp: Axis
    ep: Axis
    back: Axis

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Those that lead to other ranks."""
        axes = [self.pp, self.back, self.tp]
        if self.ep.comm is not self.tp.comm:
            axes.append(self.ep)
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

    tp, stages = axis("tp", topology.group("tp", rank)), topology.group("pp", rank)
    ends = (stages[0], stages[-1]) if len(stages) > 1 and rank in (stages[0], stages[-1]) else (rank,)
    across = expert_parallel and topology.size("dp") > 1
    return Mesh(
        topology,
        rank,
        pp=axis("pp", stages),
        tp=tp,
        ep=axis("ep", topology.plane(("dp", "tp"), rank)) if across else Axis("ep", tp.rank, tp.size, tp.comm),
        back=axis("back", ends),
    )
