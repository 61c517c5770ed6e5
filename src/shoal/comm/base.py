"""The interface through which ranks exchange tensors, and the helpers that its implementations share."""

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class OperationTotal:
    """The calls of one operation by a rank: how many, their bytes and their times, added up."""

    count: int = 0
    sent_bytes: int = 0  # to other ranks: the least that the operation needs; a backend may send more
    ns: int | None = None  # nanoseconds in the operation; None: the backend cannot measure them
    waited_ns: int | None = None  # the part of them in which it waited for others; None: the backend cannot tell
    waited_for: dict[int, int] = field(default_factory=dict)  # the same, by the rank of the group that came last

    def add_time(self, ns: int | None = None, waited_ns: int | None = None, last: int | None = None) -> None:
        """Add nanoseconds of the operation, and of waiting for the rank that came last; None: nothing is known."""
        if ns is not None:
            self.ns = (self.ns or 0) + ns
        if waited_ns is not None:
            self.waited_ns = (self.waited_ns or 0) + waited_ns
            if last is not None and waited_ns:
                self.waited_for[last] = self.waited_for.get(last, 0) + waited_ns

    def add_times_of(self, other: "OperationTotal") -> None:
        """Add the times of another total."""
        self.add_time(other.ns, other.waited_ns)
        for rank, waited_ns in other.waited_for.items():
            self.waited_for[rank] = self.waited_for.get(rank, 0) + waited_ns


class Times(Protocol):
    """The times that a library has measured itself. Counts and bytes in them are not read."""

    def all(self) -> Mapping[str, OperationTotal]:
        """Return the times of each operation that was called."""

    def of(self, operation: str) -> OperationTotal:
        """Return the times of one operation."""


class OperationWatch(Protocol):
    """Is told of each operation of a communicator while it runs, for a trace. All calls come from the rank's thread."""

    def began(self, operation: str, sent_bytes: int) -> None:
        """An operation begins, or goes on after it was begun earlier, with no bytes."""

    def ended(self, operation: str) -> None:
        """The operation has ended. It may be the forming of the group, whose beginning is not told."""


@dataclass(slots=True)
class Progress:
    """The operation that a communicator is executing, and the totals of all operations so far.

    The rank's own thread writes it; other threads may read the current operation.
    """

    operation: str = ""  # "" between operations
    number: int = 0  # of the current operation, or of the last one
    count: int = 0  # operations begun so far
    totals: dict[str, OperationTotal] = field(default_factory=lambda: defaultdict(OperationTotal))  # by operation
    watch: OperationWatch | None = None
    _times: Times | None = None  # of the library that measures the operations, if one does

    def begin(self, operation: str, sent_bytes: int = 0) -> None:
        """Count a new operation and show it as the current one. Does what `during` does, but measures no time."""
        self.count += 1
        total = self.totals[operation]
        total.count += 1
        total.sent_bytes += sent_bytes
        self.operation, self.number = operation, self.count
        if self.watch is not None:
            self.watch.began(operation, sent_bytes)

    def end(self) -> None:
        """Show that the current operation has ended. After an error it stays, since it shows where the rank stopped."""
        if self.watch is not None:
            self.watch.ended(self.operation)
        self.operation = ""

    @contextmanager
    def during(self, operation: str, sent_bytes: int = 0, *, timed: bool = True) -> Iterator[None]:
        """Count a new operation, show it as the current one until the block ends, and measure the time of the block.

        Args:
            timed: False if the time says nothing, because the operation goes on after the block.
        """
        begun = time.perf_counter_ns()
        self.begin(operation, sent_bytes)
        yield
        if timed:
            self.totals[operation].add_time(time.perf_counter_ns() - begun)
        self.end()

    @contextmanager
    def finishing(self, operation: str, number: int, *, timed: bool = True) -> Iterator[None]:
        """Show an operation that was begun earlier as the current one until the block ends, and add this time to it."""
        begun = time.perf_counter_ns()
        self.operation, self.number = operation, number
        if self.watch is not None:
            self.watch.began(operation, 0)
        yield
        if timed:
            self.totals[operation].add_time(time.perf_counter_ns() - begun)
        self.end()

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Show that the group is being formed until the block ends. It does not count, since it moves no tensors."""
        self.operation, self.number = "connect", self.count + 1
        yield
        self.end()

    def take_times(self, times: Times) -> None:
        """Take the times of operations from a library from now on. Those of an earlier one stay in the totals."""
        for operation, total in self._measured().items():
            self.totals[operation].add_times_of(total)
        self._times = times

    def _measured(self) -> Mapping[str, OperationTotal]:
        """Return the times that the library has measured."""
        return {} if self._times is None else self._times.all()

    def read_totals(self) -> dict[str, OperationTotal]:
        """Return a copy of the totals, with the times that a library has measured."""
        found = copy.deepcopy(dict(self.totals))
        for operation, total in self._measured().items():
            found.setdefault(operation, OperationTotal()).add_times_of(total)
        return found

    def read_times(self, operation: str) -> OperationTotal:
        """Return the times of one operation, as in `read_totals`. The object may change with the next operation."""
        if self._times is None:
            return self.totals[operation]
        found = OperationTotal()
        found.add_times_of(self.totals[operation])
        found.add_times_of(self._times.of(operation))
        return found

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
        """The way on which tensors travel, for the log."""

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
