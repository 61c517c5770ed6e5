"""The dispatch backends by name, and the dispatch for a layout."""

from collections.abc import Callable, Sequence

import torch

from shoal.parallel.all2all.all_gather_reduce_scatter import AllGatherReduceScatter
from shoal.parallel.all2all.all_to_all import AllToAll
from shoal.parallel.all2all.group import ExpertGroup, make_expert_map
from shoal.parallel.dispatch import Dispatch, TensorParallelDispatch
from shoal.parallel.mesh import Mesh

BACKENDS: dict[str, Callable[[ExpertGroup], Dispatch]] = {
    "allgather_reducescatter": AllGatherReduceScatter,
    "all_to_all": AllToAll,
}


def make_dispatch(
    mesh: Mesh, placement: Sequence[Sequence[int]] | None, backend: str, device: torch.device
) -> Dispatch:
    """Return the dispatch for a layout.

    placement: the experts of each rank of `mesh.ep`, or None if every rank has a part of every expert. `backend` is
    used only if the experts are on ranks of several replicas.
    """
    if placement is None:
        return TensorParallelDispatch(mesh.tp)
    if mesh.ep.size == mesh.tp.size:
        experts = sum(len(held) for held in placement)
        return TensorParallelDispatch(mesh.tp, make_expert_map(placement[mesh.ep.rank], experts, device))
    return BACKENDS[backend](ExpertGroup(mesh.ep, mesh.tp, placement, device))
