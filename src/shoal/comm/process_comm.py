"""Communicators for ranks that are processes. What they exchange tensors by is chosen when they connect.

A communicator outlives its group: `connect` forms another one, perhaps by another backend, so that all who hold the
communicator, such as the layers of a model, use the new group.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.comm.base import Communicator, PendingSend, PendingSum, Progress
from shoal.comm.formation import Formation
from shoal.comm.select import Requested
from shoal.errors import CommAborted
from shoal.native_call import NativeCall


class ProcessComm:
    """One process's communicator in a group whose ranks share a store."""

    def __init__(
        self,
        store: Any,
        prefix: str,
        rank: int,
        size: int,
        *,
        requested: Requested = "auto",
        timeout_s: float,
        device: torch.device,
        interface_address: str = "127.0.0.1",
        cores: Sequence[int] = (),
        aborted: threading.Event | None = None,
    ) -> None:
        """Form the group with the other ranks of it; see `connect`.

        Args:
            requested: the backend that the user wants. All ranks have the same.
            interface_address: the address of this host, as the other ranks reach it.
            cores: the cores that are bound to this rank, if any are.
        """
        self.rank = rank
        self.size = size
        self.progress = Progress()
        self._reason = ""  # for the choice of the backend
        self._requested = requested
        self._timeout_s = timeout_s
        self._device = device
        self._interface_address = interface_address
        self._cores = tuple(cores)
        self._group: Communicator | None = None
        self.connect(store, prefix, aborted)

    def connect(self, store: Any, prefix: str, aborted: threading.Event | None = None) -> None:
        """Form the group with the other ranks of it, or form it anew after an abort.

        All ranks of the group call this with the same prefix, which must be new in the store each time.

        Args:
            aborted: ends the wait for the others when it is set, by any thread. `abort` sets it too.

        Raises:
            CommAborted: `aborted` was set.
            CommTimeout: a rank did not come in time.
            CommError: the requested backend cannot be used.
        """
        self._group = None  # closes the connections of the former group
        self._aborted = threading.Event() if aborted is None else aborted
        self._group, self._reason = Formation(
            *(store, prefix, self.rank, self.size, self._requested, self._timeout_s, self._device),
            *(self._interface_address, self._cores, self._aborted, self.progress),
        ).form()
        if self._aborted.is_set():  # by a thread that may not have seen the new group
            self._group.abort()
            raise CommAborted(f"rank {self.rank} of {self.size}: aborted while it connected")

    @property
    def backend(self) -> str:
        """The backend of the group, and the reason for its choice."""
        return f"{self._connected.backend} ({self._reason})"

    @property
    def _connected(self) -> Communicator:
        if self._group is None:
            raise CommAborted(f"rank {self.rank} of {self.size} is not connected")
        return self._group

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._connected.all_reduce(x)

    @property
    def overlaps(self) -> bool:
        return self._connected.overlaps

    def begin_all_reduce(self, x: Tensor) -> PendingSum:
        return self._connected.begin_all_reduce(x)

    def native_all_reduce(self, x: Tensor) -> NativeCall | None:
        return self._connected.native_all_reduce(x)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        return self._connected.all_gather(x, sizes, dim)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        return self._connected.reduce_scatter(x, sizes)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self._connected.all_to_all(x, send, receive)

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        return self._connected.broadcast(x, root)

    def send(self, x: Tensor, to: int) -> PendingSend:
        return self._connected.send(x, to)

    def recv(self, x: Tensor, source: int) -> Tensor:
        return self._connected.recv(x, source)

    def barrier(self) -> None:
        self._connected.barrier()

    def abort(self) -> None:
        """End every operation of the group, current and future, on all of its ranks, and a connect of this rank."""
        self._aborted.set()
        if self._group is not None:
            self._group.abort()
