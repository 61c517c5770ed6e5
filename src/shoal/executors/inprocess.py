"""One rank in the caller's own thread. It computes while the engine polls."""

import os
from collections import deque
from collections.abc import Sequence

from shoal.comm.base import Communicator
from shoal.errors import ConfigError, RankFailed
from shoal.wire.base import Stop
from shoal.wire.ranks import FromRank, RankSetup, ToRank
from shoal.worker.rank import Rank


class InProcessLinks:
    world_size = 1

    def __init__(self, setups: Sequence[RankSetup], groups: object = None) -> None:
        """Needs nothing of its arguments: a rank alone meets nobody."""
        self._rank = Rank(_no_groups)
        self._inbox: deque[ToRank] = deque()
        self._interrupted = False

    def send(self, message: ToRank, rank: int | None = None) -> None:
        self._inbox.append(message)

    def receive(self, timeout: float) -> list[FromRank]:
        if self._interrupted:
            raise RankFailed(f"rank 0 ({self.describe(0)}) was interrupted in the middle of its work: start anew")
        while self._inbox:
            message = self._inbox.popleft()
            if not isinstance(message, Stop):
                self._interrupted = True  # stays so if Ctrl-C ends it half-way: nobody knows what it has done
                answer = self._rank.answer(message)
                self._interrupted = False
                if answer is not None:
                    return [answer]
        return []

    def describe(self, rank: int) -> str:
        return f"this process, {os.getpid()}, after step {self._rank.last_step}"

    def close(self, *, failed: bool) -> None:
        self._inbox.clear()
        self._rank = Rank(_no_groups)  # lets go of weights and cache


def _no_groups(setup: RankSetup, axis: str, ranks: Sequence[int]) -> Communicator:
    raise ConfigError(f"the executor uni runs one rank; {axis} asks for {len(ranks)}: use threads or mp")
