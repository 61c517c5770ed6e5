"""Communicators of ranks that are processes: torch.distributed over stores that all of a group's ranks reach."""

from collections.abc import Sequence
from typing import Any

import torch

from shoal.comm.base import Communicator
from shoal.comm.torch_dist import TorchComm, file_store
from shoal.wire.ranks import RankSetup
from shoal.worker.group_store import RendezvousStore


class ProcessGroups:
    """A replica's ranks meet over a file of the engine's that has no name of its own, of which `store` is a descriptor:
    nothing to clean up, nothing to clash. Groups with ranks of other replicas meet at their rendezvous, where those of
    earlier engines have left their addresses: a meeting's number keeps them apart."""

    def __init__(self, store: int, world_size: int) -> None:
        self._own_store = store
        self._world_size = world_size
        self._own: Any = None
        self._shared: RendezvousStore | None = None

    def __call__(self, setup: RankSetup, axis: str, ranks: Sequence[int]) -> Communicator:
        cuda = setup.rank_plan.device == "cuda" and axis != "back"  # drawn tokens are on the host
        store = self._store(setup, ranks)
        name = f"{axis}:{ranks[0]}"
        return TorchComm(
            store,
            f"{setup.plan.place.meeting}:{name}" if store is self._shared else name,
            ranks.index(setup.global_rank),
            len(ranks),
            backend="nccl" if cuda else "gloo",
            timeout_s=setup.plan.timeouts.comm_s,
            device=torch.device("cuda", setup.rank_plan.device_index) if cuda else torch.device("cpu"),
            interface_address=setup.plan.place.address,
        )

    def close(self) -> None:
        """Lets go of the rendezvous; groups that were made go on."""
        if self._shared is not None:
            self._shared.close()

    def _store(self, setup: RankSetup, ranks: Sequence[int]) -> Any:
        first = setup.global_rank - setup.rank
        replica = range(first, first + setup.world_size)
        if not set(ranks) <= set(replica):
            if self._shared is None:
                place = setup.plan.place
                self._shared = RendezvousStore(place.rendezvous, place.key, timeout_s=setup.plan.timeouts.comm_s)
            return self._shared
        if self._own is None:
            self._own = file_store(self._own_store, self._world_size)
        return self._own
