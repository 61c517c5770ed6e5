"""Ranks as processes, through torch.distributed's backends: gloo on CPUs, NCCL on GPUs.

The process groups are built directly, not through `init_process_group`: no global state, so that any number of
groups and engines live side by side.
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

from shoal.comm.base import Progress, Sending, bytes_to_others, reduced_bytes, sum_in_order
from shoal.errors import CommAborted, CommError, CommTimeout

c10d: Any = torch.distributed  # its bindings carry no usable types

_LOOK_UP = datetime.timedelta(seconds=0.1)  # how often a wait looks whether this end was called off
_ASK_S = 1.0  # ... how often it has the store asked whether another rank has called the group off
_ANSWER_S = 1.0  # how long a store is waited for: one that is slow or has gone must not hold up what it is asked about


def file_store(fd: int, size: int) -> Any:
    """A store of `size` ranks in a file that all of them have inherited, under the number `fd`. The file may have no
    name; its owner's entry in /proc is not needed, which nobody else may open if the owner has changed its user id."""
    return c10d.FileStore(f"/proc/self/fd/{fd}", size)


class TorchComm:
    """A group over a store that all its ranks share. `prefix` keeps groups over one store apart."""

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
    ) -> None:
        self.rank = rank
        self.size = size
        self.progress = Progress()
        self._timeout_s = timeout_s
        self._aborted = False
        self._asked = threading.Thread()
        timeout = datetime.timedelta(seconds=timeout_s)
        self._store = group_store = c10d.PrefixStore(prefix, store)
        self._backend = backend
        self._group: Any
        if backend == "nccl":
            nccl = c10d.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            self._group = c10d.ProcessGroupNCCL(group_store, rank, size, nccl)
        else:
            gloo = c10d.ProcessGroupGloo._Options()
            gloo._devices = [c10d.ProcessGroupGloo.create_device(hostname=interface_address)]
            gloo._timeout = timeout
            with self._named("connect"):
                self._group = c10d.ProcessGroupGloo(group_store, rank, size, gloo)
        self._device = device

    @contextmanager
    def _named(self, operation: str, sent_bytes: int = 0) -> Iterator[None]:
        with self.naming(operation), self.progress.during(operation, sent_bytes):
            if self._aborted:
                raise RuntimeError("called off before it began")
            yield

    @contextmanager
    def naming(self, operation: str) -> Iterator[None]:
        """Gives the backends' errors a name, a rank and a number; gloo's own say only that something timed out."""
        try:
            yield
        except RuntimeError as error:
            where = f"rank {self.rank} of {self.size}: {operation} #{self.progress.number}"
            self._ask_store()
            self._asked.join(_ANSWER_S)
            if self._aborted:
                raise CommAborted(f"{where} was aborted") from error
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise CommTimeout(f"{where} waited {self._timeout_s:g} s") from error
            raise CommError(f"{where} failed: {str(error).splitlines()[0]}") from error

    def _ask_store(self) -> None:
        """Whether the group was called off, on a thread: a store may take long to answer."""

        def ask() -> None:
            with suppress(RuntimeError, CommError):  # it may have gone, which is another story
                if self._store.check(["aborted"]):
                    self._aborted = True

        if not self._asked.is_alive():
            self._asked = _begin(ask)

    def _wait(self, work: Any) -> None:
        """gloo's own abort wakes nobody, here or elsewhere, so that waits for it look up now and then."""
        next_question = time.monotonic() + _ASK_S
        while self._backend == "gloo" and not work.is_completed():
            try:
                work.wait(_LOOK_UP)
            except RuntimeError:
                if self._aborted:
                    raise
                if time.monotonic() >= next_question:
                    self._ask_store()
                    next_question = time.monotonic() + _ASK_S
        work.wait()  # gives the work's own error

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        with self._named("all_reduce", reduced_bytes(x, self.size)):
            self._wait(self._group.allreduce([x]))
        return x

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        if dim != 0:
            return self.all_gather(x.transpose(0, dim), sizes).transpose(0, dim).contiguous()
        # The backends' own takes equal sizes only, and copies what it has received twice.
        copies = x.repeat(self.size, *[1] * (x.dim() - 1))
        return self._exchange("all_gather", copies, [len(x)] * self.size, sizes)

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        # Neither backend scatters uneven shares, and how they sum a row depends on where it stands.
        mine = sizes[self.rank]
        parts = self._exchange("reduce_scatter", x, sizes, [mine] * self.size)
        return sum_in_order(parts.view(self.size, mine, *x.shape[1:]).unbind())

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        return self._exchange("all_to_all", x, send, receive)

    def _exchange(self, operation: str, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        out = x.new_empty((sum(receive), *x.shape[1:]))
        with self._named(operation, bytes_to_others(x, send, self.rank)):
            self._wait(self._group.alltoall_base(out, x.contiguous(), list(receive), list(send)))
        return out

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        x = x.contiguous()
        options = c10d.BroadcastOptions()
        options.rootRank = root
        options.rootTensor = 0
        with self._named("broadcast", x.nbytes * (self.size - 1) if self.rank == root else 0):
            self._wait(self._group.broadcast([x], options))
        return x

    def send(self, x: Tensor, to: int) -> Sending:
        x = x.contiguous()
        with self._named("send", x.nbytes):
            return _PendingSend(self, self._group.send([x], to, 0), x)

    def recv(self, x: Tensor, source: int) -> Tensor:
        with self._named("recv"):
            self._group.recv([x], source, 0).wait()
        return x

    def barrier(self) -> None:
        self.all_reduce(torch.zeros(1, device=self._device))

    def abort(self) -> None:
        """gloo's `send` and `recv` end at their timeout only: they can't be looked at while they wait."""
        self._aborted = True

        def tell() -> None:
            with suppress(RuntimeError, CommError):
                self._store.set("aborted", "1")

        _begin(tell).join(_ANSWER_S)
        if self._backend != "gloo":  # gloo's own wakes nobody, and can itself wait for the operation's timeout
            self._group.abort()


def _begin(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True, name="store")
    thread.start()
    return thread


class _PendingSend:
    """Keeps the tensor until it has been taken over."""

    def __init__(self, comm: TorchComm, work: Any, x: Tensor) -> None:
        self._comm = comm
        self._work = work
        self._x = x
        self._number = comm.progress.number

    def wait(self) -> None:
        with self._comm.naming("send"), self._comm.progress.ending("send", self._number):
            self._work.wait()
