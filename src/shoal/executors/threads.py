"""The executor `threads`: ranks as threads of this process. They start fast, and are not isolated from each other."""

import queue
import threading
import time
from collections.abc import Sequence

from shoal.comm.base import Communicator
from shoal.comm.threads import ThreadComm, ThreadGroup, ThreadGroups
from shoal.errors import RankFailed
from shoal.wire.base import Stop
from shoal.wire.ranks import FromRank, RankSetup, ToRank
from shoal.worker.rank import Rank

_END_S = 5.0


class ThreadLinks:
    """The links to ranks that are threads."""

    def __init__(self, setups: Sequence[RankSetup], groups: ThreadGroups | None = None) -> None:
        """Start a thread for each setup.

        Args:
            groups: the groups of several replicas, the same object for all of them; None: this replica is alone.
        """
        world_size = self.world_size = len(setups)
        self._closed = False
        self._shared = groups is not None
        self._groups = groups or ThreadGroups(setups[0].plan.timeouts.comm_s)
        self._joined: set[ThreadGroup] = set()
        self._ranks = [Rank(self._join_group) for _ in range(world_size)]
        self._inboxes: list[queue.SimpleQueue[ToRank]] = [queue.SimpleQueue() for _ in range(world_size)]
        self._outbox: queue.SimpleQueue[FromRank] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(rank,), name=f"shoal-rank-{rank}", daemon=True)
            for rank in range(world_size)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, rank: int) -> None:
        own_rank = self._ranks[rank]
        while not isinstance(message := self._inboxes[rank].get(), Stop):
            answer = own_rank.answer(message)
            if answer is not None:
                self._outbox.put(answer)

    def _join_group(self, setup: RankSetup, axis: str, ranks: Sequence[int]) -> Communicator:
        group = self._groups.group(f"{axis}:{ranks[0]}", len(ranks))
        self._joined.add(group)
        return ThreadComm(group, ranks.index(setup.global_rank))

    def send(self, message: ToRank, rank: int | None = None) -> None:
        for inbox in self._inboxes if rank is None else [self._inboxes[rank]]:
            inbox.put(message)

    def receive(self, timeout: float) -> list[FromRank]:
        messages: list[FromRank] = []
        try:
            messages.append(self._outbox.get(timeout=timeout))
            while True:
                messages.append(self._outbox.get_nowait())
        except queue.Empty:
            return messages

    def replace(self, ranks: Sequence[int]) -> None:
        raise RankFailed("a rank that is a thread can't be replaced")

    def keep_spares(self) -> None:
        """Do nothing: no rank can be replaced."""

    def stuck(self, seconds: float, step: int) -> list[int]:
        return []  # a rank in this process cannot be ended alone

    def describe(self, rank: int) -> str:
        return f"thread {self._threads[rank].name}, after step {self._ranks[rank].last_step}, {self._ranks[rank].doing}"

    def close(self, *, failed: bool) -> None:
        if self._closed:
            return
        self._closed = True
        if failed or self._shared:  # a step in flight may be waiting for a replica that was closed before this one
            for group in tuple(self._joined):
                group.abort()
        self.send(Stop())
        deadline = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._ranks = [Rank(self._join_group) for _ in range(self.world_size)]  # drops weights and caches
