"""Communicators for ranks that are processes, on torch.distributed's backends: gloo for CPUs, NCCL for GPUs.

The process groups are built directly instead of with `init_process_group`, which keeps global state: so one process
can be in any number of groups and engines.
"""

import datetime
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from shoal.comm.base import PendingSend, PendingSum, Progress, bytes_to_others, reduced_bytes, sum_in_order
from shoal.errors import CommAborted, CommError, CommTimeout

c10d: Any = torch.distributed  # its bindings carry no usable types

_POLL = datetime.timedelta(seconds=0.1)  # how often a wait checks whether this rank has aborted the group
_STORE_POLL_S = 1.0  # how often a wait asks the store whether another rank has aborted the group
_STORE_TIMEOUT_S = 1.0  # the longest wait for a store: a slow or dead store must not delay an operation or its error
_CONNECT_POLL_S = 0.01  # how often a rank that connects checks whether it has aborted that
_ABORT_TAG = 2**30  # no message has it
_AT_ONCE = datetime.timedelta(milliseconds=1)


class TorchComm:
    """One process's communicator in a group whose ranks share a store. `prefix` names the group in the store."""

    def __init__(
        self,
        store: Any,
        prefix: str,
        rank: int,
        size: int,
        *,
        backend: str,
        timeout_s: float,
        device: torch.device,
        interface_address: str = "127.0.0.1",
        aborted: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Form the group with the other ranks of it.

        Args:
            prefix: must be new in the store.
            aborted: ends the wait for the others when it is set, by any thread. `abort` sets it too.
            progress: counts the operations; by default one of its own.
        """
        self.rank = rank
        self.size = size
        self.progress = Progress() if progress is None else progress
        self._timeout_s = timeout_s
        self.backend = backend
        self._device = device
        self._interface_address = interface_address
        self._store_query = threading.Thread()
        self._group: Any = None
        self.timed = backend != "nccl"  # operations on a GPU are only launched, and go on when a call returns
        self._aborted = threading.Event() if aborted is None else aborted
        self._store = c10d.PrefixStore(prefix, store)
        timeout = datetime.timedelta(seconds=self._timeout_s)
        if self.backend == "nccl":
            nccl = c10d.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            self._group = c10d.ProcessGroupNCCL(self._store, self.rank, self.size, nccl)
            return
        gloo = c10d.ProcessGroupGloo._Options()
        gloo._devices = [c10d.ProcessGroupGloo.create_device(hostname=self._interface_address)]
        gloo._timeout = timeout
        with self.translated_errors("connect"), self.progress.connecting():
            self._group = self._connect_gloo(gloo)

    def _connect_gloo(self, options: Any) -> Any:
        """Return the group, once all ranks are there.

        Nothing ends gloo's wait for a rank that does not come. So a thread waits, and is left alone after an abort.
        """
        if self._aborted.is_set():
            raise RuntimeError("aborted before it began")
        groups: list[Any] = []
        errors: list[Exception] = []
        ended = threading.Event()
        store, rank, size = self._store, self.rank, self.size

        def connect() -> None:
            try:
                groups.append(c10d.ProcessGroupGloo(store, rank, size, options))
            except Exception as error:  # noqa: BLE001 - it is raised below, if it still matters
                errors.append(error)
            ended.set()

        _start_thread(connect)
        while not ended.wait(_CONNECT_POLL_S):
            if self._aborted.is_set():
                raise RuntimeError("aborted while it connected")
        if errors:
            raise errors.pop()
        return groups.pop()

    @contextmanager
    def _operation(self, name: str, sent_bytes: int = 0) -> Iterator[None]:
        with self.translated_errors(name), self.progress.during(name, sent_bytes, timed=self.timed):
            if self._aborted.is_set():
                raise RuntimeError("aborted before it began")
            yield

    @contextmanager
    def ending(self, name: str, number: int) -> Iterator[None]:
        """Show an operation that was begun earlier as the current one until the block ends."""
        with self.translated_errors(name), self.progress.finishing(name, number, timed=self.timed):
            yield

    @contextmanager
    def translated_errors(self, operation: str) -> Iterator[None]:
        """Turn a backend's error into ours, which names rank and operation: gloo's says only that a wait timed out."""
        try:
            yield
        except RuntimeError as error:
            where = f"rank {self.rank} of {self.size}: {operation} #{self.progress.number}"
            if not self._aborted.is_set():
                self._query_store()
                self._store_query.join(_STORE_TIMEOUT_S)
            if self._aborted.is_set():
                raise CommAborted(f"{where} was aborted") from error
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise CommTimeout(f"{where} waited {self._timeout_s:g} s") from error
            raise CommError(f"{where} failed: {str(error).splitlines()[0]}") from error

    def _query_store(self) -> None:
        """Start to ask the store whether a rank has aborted the group, on a thread, since the answer may take long."""

        store, aborted = self._store, self._aborted

        def query() -> None:
            with suppress(RuntimeError, CommError):  # the store may be dead, which is not the error to report here
                if store.check(["aborted"]):
                    aborted.set()

        if not self._store_query.is_alive():
            self._store_query = _start_thread(query)

    def finish(self, work: Any) -> None:
        """Wait for an operation. For gloo the wait polls, to see whether another rank has aborted the group."""
        next_query = time.monotonic() + _STORE_POLL_S
        while self.backend == "gloo" and not work.is_completed():
            try:
                work.wait(_POLL)
            except RuntimeError:
                if self._aborted.is_set():
                    raise
                if time.monotonic() >= next_query:
                    self._query_store()
                    next_query = time.monotonic() + _STORE_POLL_S
        work.wait()  # raises the operation's own error

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with self._operation("all_reduce", reduced_bytes(x, self.size)):
            self.finish(self._group.allreduce([x]))
        return x

    @property
    def overlaps(self) -> bool:
        return self.backend == "gloo"  # NCCL could, but whether that pays between GPUs was not measured

    def begin_all_reduce(self, x: Tensor) -> PendingSum:
        x = x.contiguous()
        with self._operation("all_reduce", reduced_bytes(x, self.size)):
            return _PendingTorchSum(self, self._group.allreduce([x]), x)

    def native_all_reduce(self, x: Tensor) -> None:
        return None

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        if dim != 0:
            return self.all_gather(x.transpose(0, dim), sizes).transpose(0, dim).contiguous()
        # The backends' own all-gather takes equal sizes only, and copies the received rows twice.
        copies = x.repeat(self.size, *[1] * (x.dim() - 1))
        return self._exchange("all_gather", copies, [len(x)] * self.size, sizes)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        # Neither backend scatters uneven shares, and their order of summation depends on the row's index.
        rows = sizes[self.rank]
        parts = self._exchange("reduce_scatter", x, sizes, [rows] * self.size)
        return sum_in_order(parts.view(self.size, rows, *x.shape[1:]).unbind())

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self._exchange("all_to_all", x, send, receive)

    def _exchange(self, operation: str, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(receive), *x.shape[1:]))
        with self._operation(operation, bytes_to_others(x, send, self.rank)):
            self.finish(self._group.alltoall_base(out, x.contiguous(), list(receive), list(send)))
        return out

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        x = x.contiguous()
        options = c10d.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        with self._operation("broadcast", x.nbytes * (self.size - 1) if self.rank == root else 0):
            self.finish(self._group.broadcast([x], options))
        return x

    def send(self, x: Tensor, to: int) -> PendingSend:
        x = x.contiguous()
        with self._operation("send", x.nbytes):
            return _PendingTorchSend(self, self._group.send([x], to, 0), x)

    def recv(self, x: Tensor, source: int) -> Tensor:
        with self._operation("recv"):
            self._group.recv([x], source, 0).wait()
        return x

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device=self._device))

    def abort(self) -> None:
        """End every operation of the group, current and future, on all of its ranks."""
        self._aborted.set()
        group, store = self._group, self._store
        if group is None:  # it is still connecting, and so are the others
            return

        def publish() -> None:
            with suppress(RuntimeError, CommError):
                store.set("aborted", "1")

        _start_thread(publish).join(_STORE_TIMEOUT_S)
        if self.backend == "gloo":
            self._close_pairs(group)
        else:
            group.abort()

    def _close_pairs(self, group: Any) -> None:
        """Close the connections of a gloo group, which ends all waits on them, here and on the other ranks.

        gloo's own abort wakes no waiting thread. But when a receive times out, gloo closes all connections.
        """
        with suppress(RuntimeError):
            group.recv([torch.zeros(1)], (self.rank + 1) % self.size, _ABORT_TAG).wait(_AT_ONCE)


def _start_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True, name="store")
    thread.start()
    return thread


class _PendingTorchSend:
    """A pending send of a backend, which keeps the tensor alive until the backend has read it."""

    def __init__(self, comm: TorchComm, work: Any, x: Tensor) -> None:
        self._comm = comm
        self._work = work
        self._x = x
        self._number = comm.progress.number

    def wait(self) -> None:
        with self._comm.ending("send", self._number):
            self._work.wait()


class _PendingTorchSum:
    """A pending all-reduce of a backend, in place."""

    def __init__(self, comm: TorchComm, work: Any, x: Tensor) -> None:
        self._comm = comm
        self._work = work
        self._x = x
        self._number = comm.progress.number

    def wait(self) -> Tensor:
        with self._comm.ending("all_reduce", self._number):
            self._comm.finish(self._work)
        return self._x
