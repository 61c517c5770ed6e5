"""Communicators for ranks that are threads of one process: to run any layout on a laptop, and for tests."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.comm.base import FinishedSum, PendingSend, Progress, bytes_to_others, reduced_bytes, sum_in_order
from shoal.errors import CommAborted, CommError, CommTimeout


class ThreadGroup:
    """The state that the threads of one group share; each rank has a `ThreadComm` on it."""

    def __init__(self, size: int, timeout_s: float, *, condition: threading.Condition | None = None) -> None:
        """A test may pass the `condition` on which ranks wait."""
        self.size = size
        self.timeout_s = timeout_s
        self._changed = threading.Condition() if condition is None else condition
        self.progress = [Progress() for _ in range(size)]  # of each rank
        self._arrived = [0] * size  # exchanges that each rank has entered
        self._last = [0, 0]  # the rank that entered an exchange last, in turn like `_values`
        # Two lists in turn: a rank can be one exchange ahead of a slower rank that still reads, but never two.
        self._values: list[list[Any]] = [[None] * size, [None] * size]
        self._sent: dict[tuple[int, int], deque[Tensor]] = {(a, b): deque() for a in range(size) for b in range(size)}
        self._num_received = dict.fromkeys(self._sent, 0)
        self._aborted = False

    def exchange(self, rank: int, value: Any, operation: str) -> list[Any]:
        """Wait until every rank has called this, and return the values of all, in rank order."""
        with self._changed:
            turn = self._arrived[rank]
            values = self._values[turn % 2]
            values[rank] = value
            self._arrived[rank] += 1
            self._last[turn % 2] = rank
            begun = time.perf_counter_ns()
            if min(self._arrived) > turn:
                self._changed.notify_all()
            if not self._changed.wait_for(lambda: min(self._arrived) > turn or self._aborted, self.timeout_s):
                missing = [r for r in range(self.size) if self._arrived[r] <= turn]
                raise CommTimeout(
                    f"rank {rank}: {operation} #{turn + 1} waited {self.timeout_s:g} s for ranks {missing}"
                )
            if self._aborted:
                raise CommAborted(f"rank {rank}: {operation} #{turn + 1} was aborted")
            self._note_wait(rank, operation, begun, self._last[turn % 2])
            return list(values)

    def _note_wait(self, rank: int, operation: str, begun: int, last: int) -> None:
        """Note that a rank has waited since `begun`, unless it came last itself."""
        waited = 0 if last == rank else time.perf_counter_ns() - begun
        self.progress[rank].totals[operation].add_time(waited_ns=waited, last=last)

    def send(self, source: int, to: int, x: Tensor) -> int:
        """Offer x to the receiver, which copies it. Returns the number of this send, for `wait_until_received`."""
        with self._changed:
            if self._aborted:
                raise CommAborted(f"rank {source}: send to rank {to} was aborted")
            queue = self._sent[source, to]
            queue.append(x)
            self._changed.notify_all()
            return self._num_received[source, to] + len(queue)

    def wait_until_received(self, source: int, to: int, number: int, operation: str) -> None:
        """Wait until the receiver has copied the tensor of the send with this number."""
        with self._changed:
            begun = time.perf_counter_ns()
            self._wait_until(lambda: self._num_received[source, to] >= number, f"rank {source}: {operation}", to)
            self._note_wait(source, "send", begun, to)

    def receive(self, source: int, to: int, x: Tensor) -> None:
        queue = self._sent[source, to]
        with self._changed:
            begun = time.perf_counter_ns()
            self._wait_until(lambda: len(queue) > 0, f"rank {to}: recv", source)
            self._note_wait(to, "recv", begun, source)
        found = queue[0]
        if (found.shape, found.dtype) != (x.shape, x.dtype):
            wanted, got = (f"{each.dtype} {list(each.shape)}" for each in (x, found))
            raise CommError(f"rank {to}: recv of {wanted}, but rank {source} sent {got}")
        x.copy_(found)
        with self._changed:
            queue.popleft()
            self._num_received[source, to] += 1
            self._changed.notify_all()

    def _wait_until(self, done: Callable[[], bool], who: str, other: int) -> None:
        if not self._changed.wait_for(lambda: done() or self._aborted, self.timeout_s):
            raise CommTimeout(f"{who} waited {self.timeout_s:g} s for rank {other}")
        if self._aborted:
            raise CommAborted(f"{who} from or to rank {other} was aborted")

    def abort(self) -> None:
        with self._changed:
            self._aborted = True
            self._changed.notify_all()


class ThreadGroups:
    """All groups of a process by name. The first rank that asks for a group creates it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._groups: dict[str, ThreadGroup] = {}

    def group(self, name: str, size: int) -> ThreadGroup:
        with self._lock:
            return self._groups.setdefault(name, ThreadGroup(size, self._timeout_s))


class ThreadComm:
    """One thread's communicator.

    Threads exchange references to tensors, so each result is a new tensor or one that no thread writes to.
    """

    overlaps = False

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.rank = rank
        self.size = group.size
        self.progress = group.progress[rank]
        self.backend = "threads"
        self._group = group

    def all_reduce(self, x: Tensor) -> Tensor:
        with self.progress.during("all_reduce", reduced_bytes(x, self.size)):
            parts = self._exchange(x, "all_reduce")
            total: Tensor = parts[0] + parts[1]  # every rank sums in rank order: the same bits on each
            for part in parts[2:]:
                total += part
        return total

    def begin_all_reduce(self, x: Tensor) -> FinishedSum:
        return FinishedSum(self.all_reduce(x))

    def native_all_reduce(self, x: Tensor) -> None:
        return None

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        with self.progress.during("all_gather", x.nbytes * (self.size - 1)):
            return torch.cat(self._exchange(x, "all_gather"), dim)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        with self.progress.during("reduce_scatter", bytes_to_others(x, sizes, self.rank)):
            parts = self._exchange(x.split(list(sizes)), "reduce_scatter")
            return sum_in_order([part[self.rank] for part in parts])

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        with self.progress.during("all_to_all", bytes_to_others(x, send, self.rank)):
            shares = self._exchange(x.split(list(send)), "all_to_all")
            return torch.cat([share[self.rank] for share in shares])

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        with self.progress.during("broadcast", x.nbytes * (self.size - 1) if self.rank == root else 0):
            found: Tensor = self._exchange(x, "broadcast")[root].clone()
        return found

    def _exchange(self, value: Any, operation: str) -> list[Any]:
        return self._group.exchange(self.rank, value, operation)

    def send(self, x: Tensor, to: int) -> PendingSend:
        with self.progress.during("send", x.nbytes):
            number = self._group.send(self.rank, to, x)
        return _PendingThreadSend(self._group, self.progress, self.rank, to, number)

    def recv(self, x: Tensor, source: int) -> Tensor:
        with self.progress.during("recv"):
            self._group.receive(source, self.rank, x)
        return x

    def barrier(self) -> None:
        with self.progress.during("barrier"):
            self._exchange(None, "barrier")

    def abort(self) -> None:
        self._group.abort()


class _PendingThreadSend:
    def __init__(self, group: ThreadGroup, progress: Progress, rank: int, to: int, number: int) -> None:
        self._group = group
        self._progress = progress
        self._operation = progress.number
        self._rank = rank
        self._to = to
        self._number = number  # among the sends of this rank to rank `to`

    def wait(self) -> None:
        with self._progress.finishing("send", self._operation):
            self._group.wait_until_received(self._rank, self._to, self._number, f"send #{self._operation}")
