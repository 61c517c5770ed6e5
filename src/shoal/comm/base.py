"""Tensors between ranks: what a communicator promises."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class Total:
    """Of one operation."""

    count: int = 0
    sent_bytes: int = 0  # to other ranks: the least that the operation asks of this rank


@dataclass(slots=True)
class Progress:
    """What a communicator is at. Written by the rank's own thread, read by whoever reports on it."""

    operation: str = ""  # "" between operations
    number: int = 0  # of the one it is at, or was at last
    count: int = 0  # operations begun so far
    totals: dict[str, Total] = field(default_factory=lambda: defaultdict(Total))  # by operation

    @contextmanager
    def during(self, operation: str, sent_bytes: int = 0) -> Iterator[None]:
        self.count += 1
        total = self.totals[operation]
        total.count += 1
        total.sent_bytes += sent_bytes
        with self.ending(operation, self.count):
            yield

    @contextmanager
    def ending(self, operation: str, number: int) -> Iterator[None]:
        """Of an operation that was begun before."""
        self.operation, self.number = operation, number
        yield
        self.operation = ""  # after an error it stays: that is where the rank stopped

    def __str__(self) -> str:
        return f"{self.operation} #{self.number}" if self.operation else f"after operation #{self.count}"


def reduced_bytes(x: Tensor, size: int) -> int:
    """What a rank sends in an all-reduce: the others' shares of its own tensor, and its share of the sum to them."""
    return 2 * x.nbytes * (size - 1) // size


def bytes_to_others(x: Tensor, sizes: Sequence[int], rank: int) -> int:
    """Of rows that go to ranks in order, `sizes[r]` to rank r."""
    return (len(x) - sizes[rank]) * x[:1].nbytes if len(x) else 0


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """The same bits wherever a row stands and whatever is beside it: parts are added one after the other,
    half-precision types in float32. Gives a new tensor of the parts' type."""
    dtype = parts[0].dtype
    total = parts[0].to(torch.float32 if dtype.itemsize < 4 else dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


class Sending(Protocol):
    """A tensor on its way."""

    def wait(self) -> None:
        """Until the tensor may be used again. Raises as the operations of `Communicator`."""


class Communicator(Protocol):
    """One rank's end of a group. Every rank of the group calls the same operations in the same order.

    Results are functional: a result may alias the input, so the input is not to be used again. Every operation
    ends within the communicator's timeout:

    Raises:
        CommTimeout: somebody did not arrive.
        CommAborted: `abort()` was called on some rank.
        CommError: the links failed.
    """

    rank: int
    size: int
    progress: Progress

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each."""

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        """Ranks' tensors side by side along `dim`; rank r brings `sizes[r]` there, which may be 0."""

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The sum over ranks, of which rank r gets `sizes[r]` rows. They are added in the ranks' order, half-precision
        types in float32: a row's bits depend on nothing else."""

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Rows of x go to ranks in order, `send[r]` to rank r; `receive[r]` come from it."""

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """The root's tensor; others bring one of its shape and dtype."""

    def send(self, x: Tensor, to: int) -> Sending:
        """Begins to send; x must not change before the end of `wait`."""

    def recv(self, x: Tensor, source: int) -> Tensor:
        """Fills x, which is contiguous, and returns it. What was sent has its shape and dtype."""

    def barrier(self) -> None: ...

    def abort(self) -> None:
        """Ends every operation of the group, now and later, from any thread. Idempotent."""
