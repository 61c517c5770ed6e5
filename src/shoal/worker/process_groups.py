"""The communicators between ranks that are processes, made by torch.distributed.

The ranks of a group find each other through a store of keys and values that all of them can reach.
"""

from collections.abc import Sequence
from typing import Any

import torch

from shoal.comm.base import Communicator
from shoal.comm.torch_distributed import TorchComm, file_store
from shoal.wire.credentials import NO_CREDENTIALS
from shoal.wire.ranks import RankSetup
from shoal.worker.rendezvous_store import RendezvousStore


class ProcessGroups:
    """The communicators of one rank.

    The ranks of one replica find each other through a file without a name that the engine has made. `store` is its
    descriptor. So nothing must be cleaned up, and engines cannot disturb each other. If the replica has several hosts,
    they use the store of the engine's listener instead. Groups with ranks of other replicas find each other through the
    rendezvous. Its store still has the addresses of earlier starts, so the number of the meeting is part of the keys.
    """

    def __init__(self, store: int, world_size: int) -> None:
        self.credentials = NO_CREDENTIALS  # of this host; the owner sets them before ranks of other hosts are met
        self._own_store = store
        self._world_size = world_size
        self._own: Any = None
        self._shared: RendezvousStore | None = None

    def __call__(self, setup: RankSetup, axis: str, ranks: Sequence[int]) -> Communicator:
        cuda = setup.rank_plan.device == "cuda" and axis != "token_return"  # drawn tokens are on the host
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
            interface_address=setup.address,
        )

    def close(self) -> None:
        """Close the connections to stores. Groups that were made can still be used."""
        for store in (self._shared, self._own):
            if isinstance(store, RendezvousStore):
                store.close()

    def _store(self, setup: RankSetup, ranks: Sequence[int]) -> Any:
        first = setup.global_rank - setup.rank
        replica = range(first, first + setup.world_size)
        if not set(ranks) <= set(replica):
            if self._shared is None:
                place = setup.plan.place
                self._shared = RendezvousStore(place.rendezvous, self.credentials, timeout_s=setup.plan.timeouts.comm_s)
            return self._shared
        if self._own is None:
            if setup.store:
                self._own = RendezvousStore(setup.store, self.credentials, timeout_s=setup.plan.timeouts.comm_s)
            else:
                self._own = file_store(self._own_store, self._world_size)
        return self._own
