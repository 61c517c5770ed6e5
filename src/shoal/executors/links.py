"""The seam between the common part of executors and the ways in which ranks are started and reached."""

from collections.abc import Sequence
from typing import Protocol

from shoal.wire.ranks import FromRank, ToRank


class Links(Protocol):
    """The connections to the ranks of a replica, which start and end them too."""

    world_size: int  # number of ranks

    def send(self, message: ToRank, rank: int | None = None) -> None:
        """Send a message to one rank, or to all. Never blocks, and keeps the order of messages."""

    def receive(self, timeout: float) -> list[FromRank]:
        """Return the messages that have arrived, after waiting up to `timeout` seconds for the first.

        Raises:
            RanksDied: ranks have died or stand still, and `replace` can start them again. Each later call raises it
                too, until then.
            RankFailed: a rank has died or does not answer, and cannot be replaced.
        """

    def replace(self, ranks: Sequence[int]) -> None:
        """Start new processes for ranks that have died, which await their setup. What is left of the old ones is ended.

        A warm spare takes the place of a new process. No spare is started until the next `keep_spares`.

        Raises:
            RankFailed: a process cannot be started.
        """

    def keep_spares(self) -> None:
        """Start the warm spares of the plan that are missing, and those that end from now on. Never raises.

        The owner calls this when the ranks can compute: a spare that loads must not delay them.
        """

    def stuck(self, seconds: float, step: int) -> list[int]:
        """Return the ranks that hang in a step: they do nothing for so many seconds, though they wait for no other."""

    def describe(self, rank: int) -> str:
        """Return a description of a rank for error messages: its process or thread, and what it was doing last."""

    def close(self, *, failed: bool) -> None:
        """End the ranks, immediately if one has failed. Idempotent, never raises."""
