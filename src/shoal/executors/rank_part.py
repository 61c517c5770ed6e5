"""The seam between the links of a replica and its ranks that are processes, on this host or on another one."""

from collections.abc import Container, Iterable, Sequence
from typing import Protocol

from shoal.transport.channel import Channel
from shoal.wire.ranks import FromRank


class RankPart(Protocol):
    """Some ranks of a replica, with the channels to them: those on this host, or those of one node."""

    ranks: Sequence[int]

    @property
    def channels(self) -> Sequence[Channel]:
        """The channels on which messages of these ranks arrive."""

    def start(self) -> None:
        """Start the processes of the ranks."""

    @property
    def can_replace(self) -> bool:
        """Return whether `replace` is possible: the host of the ranks is there."""

    def replace(self, rank: int) -> None:
        """Have a warm spare or a new process be a rank, after the old process was ended, which may still run.

        Raises:
            OSError: there is no memory for a process, or no file descriptor left.
        """

    def keep_spares(self) -> None:
        """Start the warm spares that are missing on the host of the ranks (see `Links.keep_spares`)."""

    def send(self, frame: bytes, rank: int | None = None) -> None:
        """Send an encoded message to one of these ranks, or to all of them. Never blocks, never raises."""

    def receive(self, readable: Container[Channel]) -> Iterable[FromRank]:
        """Return the messages that have arrived on the readable channels. Notes the ranks that have ended."""

    @property
    def ended(self) -> dict[int, str]:
        """The ranks that have ended, and how: the rest of a sentence that begins with the rank."""

    def suspended(self, rank: int) -> bool:
        """Return whether SIGSTOP or a debugger has stopped the process of a rank."""

    def describe(self, rank: int) -> str:
        """Return a description of the process of a rank."""

    def close(self, goodbye: bytes | None) -> None:
        """End the processes, after the message `goodbye` if there is one. Idempotent, never raises."""
