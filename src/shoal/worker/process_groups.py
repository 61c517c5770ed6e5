"""The communicators between ranks that are processes.

The ranks of a group find each other through a store of keys and values that all of them can reach.
"""

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch

from shoal.comm.base import Communicator
from shoal.comm.process_comm import ProcessComm
from shoal.comm.shared_file_store import SharedFileStore
from shoal.errors import CommAborted
from shoal.wire.base import Ids
from shoal.wire.credentials import NO_CREDENTIALS
from shoal.wire.ranks import RankSetup
from shoal.worker.rendezvous_store import RendezvousStore


class ProcessGroups:
    """The communicators of one rank.

    The ranks of one replica find each other through a file without a name that the engine has made. `store` is its
    descriptor. So nothing must be cleaned up, and engines cannot disturb each other. If the replica has several hosts,
    they use the store of the engine's listener instead. Groups with ranks of other replicas find each other through the
    rendezvous. Its store still has the addresses of earlier starts, so the number of the meeting is part of the keys.

    With a setup of a larger incarnation, the groups are formed anew: the communicators stay, and connect again. The
    incarnation, on which all replicas whose ranks form a group agree, is part of the keys.
    """

    def __init__(self, store: int) -> None:
        self.credentials = NO_CREDENTIALS  # of this host; the owner sets them before ranks of other hosts are met
        self._own_store = store
        self._own: RendezvousStore | SharedFileStore | None = None
        self._shared: RendezvousStore | None = None
        self._lock = threading.Lock()  # for what follows; `abort_before` is called on another thread
        self._comms: dict[str, ProcessComm] = {}
        self._incarnation = -1
        self._oldest = -1  # setups of smaller incarnations are obsolete
        self._aborted = threading.Event()

    def __call__(self, setup: RankSetup, axis: str, ranks: Sequence[int]) -> Communicator:
        """Return the communicator of an axis, connected to the other ranks.

        Raises:
            CommAborted: `abort_before` was called.
            CommError: the ranks could not connect.
        """
        aborted = self._begin(setup)
        cuda = setup.rank_plan.device == "cuda" and axis != "token_return"  # drawn tokens are on the host
        store = self._store(setup, ranks)
        prefix = f"{setup.plan.place.meeting}:{setup.incarnation}:{axis}:{ranks[0]}"
        comm = self._comms.get(axis)
        if comm is not None:
            comm.connect(store, prefix, aborted)
            return comm
        comm = ProcessComm(
            store,
            prefix,
            ranks.index(setup.global_rank),
            len(ranks),
            requested="auto" if setup.plan.comm_backend == "nccl" else setup.plan.comm_backend,
            timeout_s=setup.plan.timeouts.comm_s,
            device=torch.device("cuda", setup.rank_plan.device_index) if cuda else torch.device("cpu"),
            interface_address=setup.address,
            cores=_own_cores(setup),
            aborted=aborted,
        )
        with self._lock:
            self._comms[axis] = comm
        return comm

    def abort_before(self, incarnation: int) -> None:
        """End every wait for other ranks that belongs to a setup of a smaller incarnation. Any thread may call it."""
        with self._lock:
            self._oldest = incarnation
            if self._incarnation >= incarnation:
                return
            self._aborted.set()
            comms = list(self._comms.values())
        for comm in comms:
            comm.abort()

    def _begin(self, setup: RankSetup) -> threading.Event:
        """Return what aborts the groups of this setup."""
        with self._lock:
            if setup.incarnation < self._oldest:
                raise CommAborted("the ranks of the replica form their groups anew")
            if setup.incarnation == self._incarnation:
                return self._aborted
            self._incarnation, self._aborted = setup.incarnation, threading.Event()
        self.close()  # ends a thread that was left alone while it connected
        self._own = self._shared = None
        return self._aborted

    def close(self) -> None:
        """Close the connections to stores. Groups that were made can still be used."""
        for store in (self._shared, self._own):
            if store is not None:
                store.close()

    def _store(self, setup: RankSetup, ranks: Sequence[int]) -> Any:
        timeout = setup.plan.timeouts.comm_s
        first = setup.global_rank - setup.rank
        replica = range(first, first + setup.world_size)
        if not set(ranks) <= set(replica):
            if self._shared is None:
                place = setup.plan.place
                self._shared = RendezvousStore(place.rendezvous, self.credentials, timeout_s=timeout)
            return self._shared
        if self._own is None:
            if setup.store:
                self._own = RendezvousStore(setup.store, self.credentials, timeout_s=timeout)
            else:
                self._own = SharedFileStore(self._own_store, timeout_s=timeout)
        return self._own


def _own_cores(setup: RankSetup) -> Ids:
    """Return the cores that are bound to this rank alone; (): it shares its core with other ranks of this host."""
    plan, mine = setup.plan, setup.rank_plan
    here = [rank for rank in plan.ranks if rank.node == mine.node]
    used = [core for rank in here for core in rank.cores]
    crowded = len(set(used)) < len(used) or len(here) * plan.place.local_size > (os.cpu_count() or 1)
    return mine.cores if plan.bind_cores and not crowded else ()
