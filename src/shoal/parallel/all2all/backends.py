"""The ways to and from experts on other ranks, by name; and which of them, if any, a layout needs."""

from collections.abc import Callable, Sequence

import torch

from shoal.parallel.all2all.all_to_all import AllToAll
from shoal.parallel.all2all.allgather_reducescatter import AllGatherReduceScatter
from shoal.parallel.all2all.group import ExpertGroup, slots_of
from shoal.parallel.dispatch import Dispatch, TensorParallelDispatch
from shoal.parallel.mesh import Mesh

BACKENDS: dict[str, Callable[[ExpertGroup], Dispatch]] = {
    "allgather_reducescatter": AllGatherReduceScatter,
    "all_to_all": AllToAll,
}


def make_dispatch(
    mesh: Mesh, placement: Sequence[Sequence[int]] | None, backend: str, device: torch.device
) -> Dispatch:
    """`placement`: the experts that each rank of `mesh.ep` holds whole; None: every rank has a part of each. `backend`
    counts where they are on ranks of several replicas."""
    if placement is None:
        return TensorParallelDispatch(mesh.tp)
    if mesh.ep.size == mesh.tp.size:
        experts = sum(len(held) for held in placement)
        return TensorParallelDispatch(mesh.tp, slots_of(placement[mesh.ep.rank], experts, device))
    return BACKENDS[backend](ExpertGroup(mesh.ep, mesh.tp, placement, device))
