"""A rank's view of the grid of ranks, passed to every layer that is split; there is no global state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.comm.base import Communicator
from shoal.comm.local import LocalComm
from shoal.kernels.native_calls import sum_over
from shoal.parallel.topology import Topology

_PART_ROWS = 128  # the least rows of a part: a smaller one would be computed less efficiently
_MAX_PARTS = 4


@dataclass(frozen=True, slots=True)
class Axis:
    """One rank's group along one axis of the grid. For a size of 1 `comm` is a LocalComm."""

    name: str
    rank: int
    size: int
    comm: Communicator
    ranks: tuple[int, ...] = ()  # the members, by their numbers among the ranks of all replicas; (): nobody asks

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of x over the axis, as `Communicator.all_reduce` does. Recorded steps may contain it."""
        return x if self.size == 1 else sum_over(self.comm, x)

    def sum_of(self, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum of compute(x) over the axis, where `compute` gives each row of x a row that no other changes.

        Many rows are cut into parts where tensors travel between hosts while a rank computes: the sum of one part
        travels while the next one is computed.
        """
        parts = min(len(x) // _PART_ROWS, _MAX_PARTS)
        if self.size == 1 or parts < 2 or not self.comm.overlaps:
            return self.sum(compute(x))
        sums = [self.comm.begin_all_reduce(compute(part)) for part in x.tensor_split(parts)]
        return torch.cat([each.wait() for each in sums])


@dataclass(frozen=True, slots=True)
class Mesh:
    """All groups of one rank.

    `ep` has the ranks that together hold a stage's experts: a second view of the stage's dp x tp ranks.

    `token_return` has the first and the last rank of `pp`: the last one sends the sampled tokens to the first. It is a
    group of its own, since NCCL executes the operations between two ranks in one order for both directions. A rank of
    an inner stage is alone in it.
    """

    topology: Topology
    rank: int  # among the ranks of all replicas
    pp: Axis
    tp: Axis
    ep: Axis
    token_return: Axis

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes with more than one rank, each group once."""
        axes = [self.pp, self.token_return, self.tp]
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
    """Return the mesh of a rank. `connect(axis, ranks)` makes the communicator of a group of at least two ranks.

    With `expert_parallel` the ranks of different replicas are connected. A replica that shares its experts with no
    other has them on its tensor-parallel ranks, and needs no group for them.
    """

    def axis(name: str, group: Sequence[int]) -> Axis:
        comm = connect(name, group) if len(group) > 1 else LocalComm()
        return Axis(name, group.index(rank), len(group), comm, tuple(group))

    tp, stages = axis("tp", topology.group("tp", rank)), topology.group("pp", rank)
    ends = (stages[0], stages[-1]) if len(stages) > 1 and rank in (stages[0], stages[-1]) else (rank,)
    across = expert_parallel and topology.size("dp") > 1
    return Mesh(
        topology,
        rank,
        pp=axis("pp", stages),
        tp=tp,
        ep=axis("ep", topology.plane(("dp", "tp"), rank)) if across else Axis("ep", tp.rank, tp.size, tp.comm),
        token_return=axis("token_return", ends),
    )
