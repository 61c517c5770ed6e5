"""The interface through which ranks exchange tensors, and the helpers that its implementations share."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class OperationTotal:
    """The number of calls of one operation by a rank, and of the bytes that the rank sent in them."""

    count: int = 0
    sent_bytes: int = 0  # to other ranks: the least that the operation needs; a backend may send more


@dataclass(slots=True)
class Progress:
    """The operation that a communicator is executing. The rank's own thread writes it; other threads may read it."""

    operation: str = ""  # "" between operations
    number: int = 0  # of the current operation, or of the last one
    count: int = 0  # operations begun so far
    totals: dict[str, OperationTotal] = field(default_factory=lambda: defaultdict(OperationTotal))  # by operation

    def begin(self, operation: str, sent_bytes: int = 0) -> None:
        """Count a new operation and show it as the current one. Does what `during` does, but takes less time."""
        self.count += 1
        total = self.totals[operation]
        total.count += 1
        total.sent_bytes += sent_bytes
        self.operation, self.number = operation, self.count

    def end(self) -> None:
        """Show that the current operation has ended. After an error it stays, since it shows where the rank stopped."""
        self.operation = ""

    @contextmanager
    def during(self, operation: str, sent_bytes: int = 0) -> Iterator[None]:
        """Count a new operation and show it as the current one until the block ends."""
        self.begin(operation, sent_bytes)
        yield
        self.end()

    @contextmanager
    def finishing(self, operation: str, number: int) -> Iterator[None]:
        """Show an operation that was begun earlier as the current one until the block ends."""
        self.operation, self.number = operation, number
        yield
        self.end()

    def __str__(self) -> str:
        return f"{self.operation} #{self.number}" if self.operation else f"after operation #{self.count}"


def reduced_bytes(x: Tensor, size: int) -> int:
    """Bytes that a rank sends in an all-reduce: a reduce-scatter of its tensor, then an all-gather of the sum."""
    return 2 * x.nbytes * (size - 1) // size


def bytes_to_others(x: Tensor, sizes: Sequence[int], rank: int) -> int:
    """Bytes that leave this rank when the rows of x go to the ranks in order, `sizes[r]` of them to rank r."""
    return (len(x) - sizes[rank]) * x[:1].nbytes if len(x) else 0


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """Add the parts one after the other, half-precision types in float32; returns a new tensor of their dtype.

    The fixed order gives a row the same bits at every index and beside any other rows.
    """
    dtype = parts[0].dtype
    total = parts[0].to(torch.float32 if dtype.itemsize < 4 else dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


class PendingSend(Protocol):
    """A send that was begun and may not have ended."""

    def wait(self) -> None:
        """Block until the tensor may be used again. Raises the same errors as the operations of `Communicator`."""


class Communicator(Protocol):
    """One rank's handle on a group. Every rank of the group calls the same operations in the same order.

    A result may share memory with the input, so the caller must not use the input afterwards. Every operation ends
    within the communicator's timeout:

    Raises:
        CommTimeout: a rank did not call the operation in time.
        CommAborted: `abort()` was called on some rank.
        CommError: a connection failed.
    """

    rank: int
    size: int
    progress: Progress

    @property
    def backend(self) -> str:
        """How the tensors travel, for the log."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over ranks, with the same bits on each rank."""

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """Concatenate the ranks' tensors along `dim`, where rank r's tensor has size `sizes[r]` (0 is allowed)."""

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Sum over ranks and give `sizes[r]` rows of the sum to rank r.

        The ranks' rows are added in rank order, half-precision types in float32: a row's bits depend on nothing else.
        """

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send the rows of x to the ranks in order, `send[r]` to rank r, and receive `receive[r]` rows from it."""

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """Return the root's tensor. The other ranks pass a tensor of the same shape and dtype."""

    def send(self, x: Tensor, to: int) -> PendingSend:
        """Begin to send x, which must not change until `wait` has returned."""

    def recv(self, x: Tensor, source: int) -> Tensor:
        """Receive into x, which is contiguous, and return it. The sent tensor has its shape and dtype."""

    def barrier(self) -> None: ...

    def abort(self) -> None:
        """End every operation of the group, current and future. Any thread may call this, and call it again."""
