"""The executor `uni`: a single rank in the thread of the engine, which computes while the engine polls."""

import os
from collections import deque
from collections.abc import Sequence

from shoal.comm.base import Communicator
from shoal.errors import ConfigError, RankFailed
from shoal.wire.base import Stop
from shoal.wire.ranks import FromRank, RankSetup, ToRank
from shoal.worker.rank import Rank


class InProcessLinks:
    """The link to a rank in the same thread."""

    world_size = 1

    def __init__(self, setups: Sequence[RankSetup], groups: object = None) -> None:
        """Make the rank. The arguments, which other links need, are not used."""
        self._rank = Rank(_no_groups)
        self._inbox: deque[ToRank] = deque()
        self._interrupted = False

    def send(self, message: ToRank, rank: int | None = None) -> None:
        self._inbox.append(message)

    def receive(self, timeout: float) -> list[FromRank]:
        if self._interrupted:
            raise RankFailed(
                f"rank 0 ({self.describe(0)}) was interrupted in the middle of its work: start the engine again"
            )
        while self._inbox:
            message = self._inbox.popleft()
            if not isinstance(message, Stop):
                self._interrupted = True  # remains True if Ctrl-C ends the work, which leaves an unknown state
                answer = self._rank.answer(message)
                self._interrupted = False
                if answer is not None:
                    return [answer]
        return []

    def replace(self, ranks: Sequence[int]) -> None:
        raise RankFailed("a rank that is part of this process can't be replaced")

    def keep_spares(self) -> None:
        """Do nothing: no rank can be replaced."""

    def stuck(self, seconds: float, step: int) -> list[int]:
        return []  # a rank in this process cannot be ended alone

    def describe(self, rank: int) -> str:
        return f"this process, {os.getpid()}, after step {self._rank.last_step}"

    def close(self, *, failed: bool) -> None:
        self._inbox.clear()
        self._rank = Rank(_no_groups)  # drops weights and cache


def _no_groups(setup: RankSetup, axis: str, ranks: Sequence[int]) -> Communicator:
    raise ConfigError(f"the executor uni runs one rank, but axis {axis} has {len(ranks)}: use threads or mp")
