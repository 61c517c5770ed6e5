"""The interface through which ranks exchange tensors, and the helpers that its implementations share."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from shoal.native_call import NativeCall


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

    def add(self, other: "OperationTotal") -> None:
        """Add another total."""
        self.count += other.count
        self.sent_bytes += other.sent_bytes
        self.add_time(other.ns, other.waited_ns)
        for rank, waited_ns in other.waited_for.items():
            self.waited_for[rank] = self.waited_for.get(rank, 0) + waited_ns


class Counter(Protocol):
    """A library that counts and measures the operations that it executes. Any thread may ask it."""

    def position(self) -> tuple[str, int]:
        """Return the current operation, "" between operations, and how many operations were begun."""

    def totals(self) -> Mapping[str, OperationTotal]:
        """Return the totals of each operation that was called."""

    def total(self, operation: str) -> OperationTotal:
        """Return the totals of one operation."""


class OperationWatch(Protocol):
    """Is told of each operation of a communicator while it runs, for a trace. All calls come from the rank's thread."""

    def began(self, operation: str, sent_bytes: int) -> None:
        """An operation begins, or goes on after it was begun earlier, with no bytes."""

    def ended(self, operation: str) -> None:
        """The operation has ended. It may be the forming of the group, whose beginning is not told."""


class Progress:
    """The operation that a communicator is executing, and the totals of all operations so far.

    The rank's own thread writes it, or a library that counts itself; other threads may read the current operation.
    """

    def __init__(self) -> None:
        self.watch: OperationWatch | None = None
        self.totals: dict[str, OperationTotal] = defaultdict(OperationTotal)  # of what no library counts, by operation
        self._operation = ""
        self._number = 0  # of the current operation, or of the last one
        self._count = 0
        self._counter: Counter | None = None

    @property
    def operation(self) -> str:
        """The current operation, "" between operations."""
        return self._operation or self._counted()[0]

    @property
    def number(self) -> int:
        """The number of the current operation, or of the last one."""
        return self._number if self._counter is None or self._operation else self.count

    @property
    def count(self) -> int:
        """The number of operations that were begun so far."""
        return self._count + self._counted()[1]

    def _counted(self) -> tuple[str, int]:
        counter = self._counter
        return ("", 0) if counter is None else counter.position()

    def begin(self, operation: str, sent_bytes: int = 0) -> None:
        """Count a new operation and show it as the current one. Does what `during` does, but measures no time."""
        self._count += 1
        total = self.totals[operation]
        total.count += 1
        total.sent_bytes += sent_bytes
        self._operation, self._number = operation, self._count
        if self.watch is not None:
            self.watch.began(operation, sent_bytes)

    def end(self) -> None:
        """Show that the current operation has ended. After an error it stays, since it shows where the rank stopped."""
        if self.watch is not None:
            self.watch.ended(self._operation)
        self._operation = ""

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
        self._operation, self._number = operation, number
        if self.watch is not None:
            self.watch.began(operation, 0)
        yield
        if timed:
            self.totals[operation].add_time(time.perf_counter_ns() - begun)
        self.end()

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Show that the group is being formed until the block ends. It does not count, since it moves no tensors.

        What the library of a former group has counted stays in the totals.
        """
        count = self.count
        self.totals = defaultdict(OperationTotal, self.read_totals())
        self._operation, self._number, self._count, self._counter = "connect", count + 1, count, None
        yield
        self.end()

    def take_from(self, counter: Counter) -> None:
        """Take the current operation and the totals from a library from now on, in addition to those so far."""
        self._counter = counter

    def read_totals(self) -> dict[str, OperationTotal]:
        """Return a copy of the totals, with those that a library has counted."""
        counted = {} if self._counter is None else self._counter.totals()
        return {operation: self.read_total(operation) for operation in {**self.totals, **counted}}

    def read_total(self, operation: str) -> OperationTotal:
        """Return a copy of the totals of one operation."""
        found = OperationTotal()
        if operation in self.totals:
            found.add(self.totals[operation])
        if self._counter is not None:
            found.add(self._counter.total(operation))
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


class PendingSum(Protocol):
    """A sum over ranks that was begun and may not have ended."""

    def wait(self) -> Tensor:
        """Return the sum. Raises the same errors as the operations of `Communicator`."""


@dataclass(frozen=True, slots=True)
class FinishedSum:
    """A sum that had ended when its operation returned."""

    total: Tensor

    def wait(self) -> Tensor:
        return self.total


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

    @property
    def overlaps(self) -> bool:
        """True if tensors travel between hosts while this rank computes, after `begin_all_reduce`. All ranks agree."""

    def begin_all_reduce(self, x: Tensor) -> PendingSum:
        """Begin an all-reduce. Sums are awaited in the order in which they were begun."""

    def native_all_reduce(self, x: Tensor) -> NativeCall | None:
        """Return a call that replaces x, which is contiguous, by the sum over ranks; None if there is none.

        It does the same as `all_reduce`, but does not tell a watch. It belongs to the group that is connected now.
        """

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
