"""A communicator for a rank that is alone in its group: every operation returns its input."""

from collections.abc import Sequence

from torch import Tensor

from shoal.comm.base import FinishedSum, PendingSend, Progress
from shoal.errors import CommError


class LocalComm:
    overlaps = False

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self.progress = Progress()
        self.backend = "none"

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def begin_all_reduce(self, x: Tensor) -> FinishedSum:
        return FinishedSum(self.all_reduce(x))

    def native_all_reduce(self, x: Tensor) -> None:
        return None

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        return x

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return x

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return x

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return x

    def send(self, x: Tensor, to: int) -> PendingSend:
        raise CommError(f"send to rank {to} in a group of one")

    def recv(self, x: Tensor, source: int) -> Tensor:
        raise CommError(f"recv from rank {source} in a group of one")

    def barrier(self) -> None:
        pass

    def abort(self) -> None:
        pass
