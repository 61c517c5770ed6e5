"""Communicators for ranks that are processes. What they exchange tensors by is chosen when they connect.

A communicator outlives its group: `connect` forms another one, perhaps by another backend, so that all who hold the
communicator, such as the layers of a model, use the new group.
"""

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from shoal.comm.base import Communicator, PendingSend, Progress
from shoal.comm.select import Backend, Member, Requested, choose_backend
from shoal.comm.shared_memory import SharedMemory, SharedMemoryComm, host_identity, load_library
from shoal.comm.torch_distributed import TorchComm
from shoal.errors import CommAborted, CommError, CommTimeout

_FIRST_PAUSE_S, _PAUSE_S = 0.0005, 0.02  # between two looks at the store, shorter at first


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
        self._backend: Backend = "gloo"
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
        with self.progress.connecting(counted=False):  # gloo counts it itself
            members = self._introduce(store, prefix)
            self._backend, self._reason = choose_backend(self._requested, self._device.type, members)
            if self._backend == "shm":
                self._group = self._share_memory(store, prefix, members)
        if self._group is None:
            self._group = TorchComm(
                store,
                prefix,
                self.rank,
                self.size,
                backend=self._backend,
                timeout_s=self._timeout_s,
                device=self._device,
                interface_address=self._interface_address,
                aborted=self._aborted,
                progress=self.progress,
            )

    def _introduce(self, store: Any, prefix: str) -> list[Member]:
        """Tell the others about this rank, and return what all of them tell."""
        if self._device.type == "cuda" or self._requested == "gloo":
            return []  # the choice does not depend on it
        library, reason = load_library()
        unable = reason if library is None else ""
        if library is not None and self.size > library.max_ranks():
            unable = f"shared memory serves at most {library.max_ranks()} ranks, and there are {self.size}"
        own = Member(host_identity(), os.getpid(), self._cores, unable)
        store.set(f"{prefix}/member/{self.rank}", json.dumps(asdict(own)))
        told = [json.loads(self._get(store, f"{prefix}/member/{rank}", rank)) for rank in range(self.size)]
        return [Member(**{**fields, "cores": tuple(fields["cores"])}) for fields in told]

    def _share_memory(self, store: Any, prefix: str, members: Sequence[Member]) -> Communicator | None:
        """Return a communicator on shared memory, or None on all ranks if one of them cannot open the memory."""
        memory, problem = None, ""
        try:
            if self.rank == 0:
                memory = SharedMemory.make(self.size)
                store.set(f"{prefix}/memory", memory.name)
            else:
                memory = SharedMemory.open(self._get(store, f"{prefix}/memory", 0).decode())
        except (OSError, ValueError) as error:
            problem = f"rank {self.rank} cannot map shared memory: {error}"
            if self.rank == 0:
                store.set(f"{prefix}/memory", "none")
        store.set(f"{prefix}/mapped/{self.rank}", problem)
        problems = [self._get(store, f"{prefix}/mapped/{rank}", rank).decode() for rank in range(self.size)]
        if memory is not None:
            memory.close_file()
        if memory is None or any(problems):
            self._reason = next(each for each in problems if each)
            if self._requested == "shm":
                raise CommError(f"--comm-backend shm: {self._reason}; --comm-backend auto takes what is possible")
            self._backend = "gloo"
            return None
        used = [core for member in members for core in member.cores]
        return SharedMemoryComm(
            memory,
            self.rank,
            [member.process for member in members],
            timeout_s=self._timeout_s,
            spin=all(member.cores for member in members) and len(set(used)) == len(used),
            progress=self.progress,
        )

    def _get(self, store: Any, key: str, rank: int) -> bytes:
        """Wait until another rank has set a key, and return the value."""
        deadline, pause = time.monotonic() + self._timeout_s, _FIRST_PAUSE_S
        where = f"rank {self.rank} of {self.size}: {self.progress}"
        while True:
            if self._aborted.is_set():
                raise CommAborted(f"{where} was aborted")
            if store.check([key]):
                return bytes(store.get(key))
            if time.monotonic() > deadline:
                raise CommTimeout(f"{where} waited {self._timeout_s:g} s for rank {rank}")
            self._aborted.wait(pause)
            pause = min(2 * pause, _PAUSE_S)

    @property
    def backend(self) -> str:
        """The backend of the group, and the reason for its choice."""
        return f"{self._backend} ({self._reason})"

    @property
    def _connected(self) -> Communicator:
        if self._group is None:
            raise CommAborted(f"rank {self.rank} of {self.size} is not connected")
        return self._group

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._connected.all_reduce(x)

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
