"""The measurement of each operation between ranks, for `shoal bench comm`."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.comm.base import Communicator
from shoal.comm.select import Requested
from shoal.errors import CommError

_RUN_S = 0.001  # an operation that takes less is repeated within a run, so that the clock and the barrier count little
_MOST_CALLS = 200  # in a run


@torch.inference_mode()
def measure(
    connect: Callable[[str, Requested], Communicator], rank: int, question: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Measure every operation with every size over every backend.

    Each result has the operation, the bytes, the backend, and the seconds of a call in each run.

    Raises:
        CommError: an operation has given a wrong result.
    """
    dtype = getattr(torch, question["dtype"])
    comms = {backend: connect(backend, backend) for backend in question["backends"]}
    for operation in question["operations"]:
        for size in [0] if operation in question["without_size"] else question["sizes"]:
            for backend, comm in comms.items():
                cell = Cell(comm, operation, size // dtype.itemsize, dtype)
                if not cell.right():
                    raise CommError(f"rank {rank}: {operation} of {size} bytes over {backend} gives a wrong result")
                seconds = list(_time(comm, cell, question["repeat"]))
                yield {"operation": operation, "bytes": cell.num_bytes, "backend": backend, "seconds": seconds}


def _time(comm: Communicator, cell: "Cell", repeat: int) -> Iterator[float]:
    """Yield the seconds of a call in each run, on this rank. All ranks begin a run together."""
    calls = _calls_per_run(comm, cell)
    for _ in range(repeat):
        comm.barrier()
        begun = time.perf_counter()
        for _ in range(calls):
            cell.call()
        yield (time.perf_counter() - begun) / calls


def _calls_per_run(comm: Communicator, cell: "Cell") -> int:
    """Return how many calls a run needs, the same on all ranks."""
    comm.barrier()
    begun = time.perf_counter()
    cell.call()
    own = torch.tensor([time.perf_counter() - begun], dtype=torch.float64)
    slowest = float(comm.all_gather(own, [1] * comm.size).max())
    return min(max(math.ceil(_RUN_S / slowest), 1), _MOST_CALLS)


class Cell:
    """One operation with one size over one communicator."""

    def __init__(self, comm: Communicator, operation: str, elements: int, dtype: torch.dtype) -> None:
        """elements: numbers in the largest tensor of a rank; 0 for an operation without one."""
        self.comm = comm
        self.shares = [elements // comm.size + (rank < elements % comm.size) for rank in range(comm.size)]
        self.received = torch.zeros(elements, dtype=dtype)
        self._operation = _OPERATIONS[operation]
        self._elements = elements
        self._dtype = dtype
        self._gathers = operation == "all_gather"
        self._zeros = torch.zeros_like(self.input(comm.rank))

    @property
    def num_bytes(self) -> int:
        return self._elements * self._dtype.itemsize

    def call(self) -> None:
        """Call the operation with zeros, which stay zeros however often they are summed."""
        self._operation.run(self, self._zeros)

    def right(self) -> bool:
        """Call the operation once with numbers, and return whether the result is right."""
        found, expected = self._operation.run(self, self.input(self.comm.rank)), self._operation.expected(self)
        return found is None or expected is None or torch.equal(found, expected)

    def input(self, rank: int) -> Tensor:
        """Return a rank's input, whose numbers are so small that all sums are exact."""
        length = self.shares[rank] if self._gathers else self._elements
        return ((torch.arange(length) + rank) % 3).to(self._dtype)

    def inputs(self) -> list[Tensor]:
        return [self.input(rank) for rank in range(self.comm.size)]

    def sum(self) -> Tensor:
        return torch.stack(self.inputs()).double().sum(0).to(self._dtype)


@dataclass(frozen=True, slots=True)
class _Operation:
    run: Callable[[Cell, Tensor], Tensor | None]
    expected: Callable[[Cell], Tensor | None]


def _all_to_all(cell: Cell, x: Tensor) -> Tensor:
    comm, shares = cell.comm, cell.shares
    return comm.all_to_all(x, shares, [shares[comm.rank]] * comm.size)


def _send_recv(cell: Cell, x: Tensor) -> Tensor:
    """Send to the next rank of a ring, and receive from the one before."""
    comm = cell.comm
    sending = comm.send(x, (comm.rank + 1) % comm.size)
    received = comm.recv(cell.received, (comm.rank - 1) % comm.size)
    sending.wait()
    return received


_OPERATIONS = {
    "all_reduce": _Operation(lambda cell, x: cell.comm.all_reduce(x), lambda cell: cell.sum()),
    "all_gather": _Operation(
        lambda cell, x: cell.comm.all_gather(x, cell.shares), lambda cell: torch.cat(cell.inputs())
    ),
    "reduce_scatter": _Operation(
        lambda cell, x: cell.comm.reduce_scatter(x, cell.shares),
        lambda cell: cell.sum().split(cell.shares)[cell.comm.rank],
    ),
    "all_to_all": _Operation(
        _all_to_all, lambda cell: torch.cat([each.split(cell.shares)[cell.comm.rank] for each in cell.inputs()])
    ),
    "broadcast": _Operation(lambda cell, x: cell.comm.broadcast(x, 0), lambda cell: cell.input(0)),
    "send_recv": _Operation(_send_recv, lambda cell: cell.input((cell.comm.rank - 1) % cell.comm.size)),
    "barrier": _Operation(lambda cell, _: cell.comm.barrier(), lambda _: None),
}
