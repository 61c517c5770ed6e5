"""A communicator for a group that spans hosts: sums are formed on each host first, then between one rank of each.

So a tensor crosses the network once for each host instead of once for each rank. All other operations move data that
each rank has alone, and use one flat group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from shoal.comm.base import Communicator, FinishedSum, PendingSend, PendingSum, reduced_bytes
from shoal.errors import CommAborted, CommError


class HostTreeComm:
    """One rank's communicator in a group that spans hosts. All ranks get the same bits of a sum."""

    def __init__(self, flat: Communicator, local: Communicator, leaders: Communicator | None) -> None:
        """Combine three communicators of this rank.

        Args:
            flat: of the whole group. Its progress also counts the sums.
            local: of the ranks of this host. Its rank 0 is the host's leader.
            leaders: of the leaders of all hosts, in the order of the hosts; None if this rank is no leader.
        """
        self.rank = flat.rank
        self.size = flat.size
        self.progress = flat.progress
        self.backend = f"{local.backend} and {flat.backend}"
        self.overlaps = flat.overlaps
        self._flat = flat
        self._local = local
        self._leaders = leaders

    def all_reduce(self, x: Tensor) -> Tensor:
        with self.named_errors(), self.progress.during("all_reduce", reduced_bytes(x, self.size)):
            total = self._local.all_reduce(x)
            if self._leaders is not None:
                total = self._leaders.all_reduce(total)
            return self._local.broadcast(total, 0)

    def begin_all_reduce(self, x: Tensor) -> PendingSum:
        with self.named_errors(), self.progress.during("all_reduce", reduced_bytes(x, self.size)):
            total = self._local.all_reduce(x)
            pending = FinishedSum(total) if self._leaders is None else self._leaders.begin_all_reduce(total)
            return _PendingTreeSum(self, self._local, pending)

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Let errors of the parts, which number their ranks themselves, begin with the number in the whole group.

        An abort that one part tells is passed on to the others, since not all ranks belong to all parts.
        """
        try:
            yield
        except CommError as error:
            if isinstance(error, CommAborted):
                self.abort()
            raise type(error)(f"rank {self.rank} of {self.size}: {self.progress}: {error}") from error

    def native_all_reduce(self, x: Tensor) -> None:
        return None

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        return self._flat.all_gather(x, sizes, dim)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._flat.reduce_scatter(x, sizes)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self._flat.all_to_all(x, send, receive)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return self._flat.broadcast(x, root)

    def send(self, x: Tensor, to: int) -> PendingSend:
        return self._flat.send(x, to)

    def recv(self, x: Tensor, source: int) -> Tensor:
        return self._flat.recv(x, source)

    def barrier(self) -> None:
        self._flat.barrier()

    def abort(self) -> None:
        """End every operation of the group, current and future, on all of its ranks."""
        for comm in (self._flat, self._local, self._leaders):
            if comm is not None:
                comm.abort()


class _PendingTreeSum:
    """A sum that the leaders of the hosts form. The other ranks of a host get it from theirs."""

    def __init__(self, tree: HostTreeComm, local: Communicator, between: PendingSum) -> None:
        self._tree = tree
        self._local = local
        self._between = between
        self._number = tree.progress.number

    def wait(self) -> Tensor:
        with self._tree.named_errors(), self._tree.progress.finishing("all_reduce", self._number):
            return self._local.broadcast(self._between.wait(), 0)
