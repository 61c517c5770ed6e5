"""Communicators for ranks of one host, through memory that all of them map: `csrc/shared_memory.cpp`.

The memory is a file without a name, so that nothing is left when processes are killed. Its address space is much larger
than the memory that it takes: a page exists once it was written to.
"""

import contextlib
import ctypes
import math
import os
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.comm.base import FinishedSum, OperationTotal, PendingSend, Progress, bytes_to_others, reduced_bytes
from shoal.comm.shared_memory_library import Library, loaded_library
from shoal.errors import CommAborted, CommError, CommTimeout
from shoal.native_call import NativeCall

_SPIN_US = 300  # how long a wait keeps its core, if there is a core for each rank

_OPERATIONS = (
    *("", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"),
    *("broadcast", "send", "recv", "barrier"),
)  # by their codes in the library
_TYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.uint8: 6,
}
_TIMEOUT, _ABORTED, _DIED, _MISMATCH = 1, 2, 3, 4

_INT, _LONG = ctypes.c_int32, ctypes.c_int64


def host_identity() -> str:
    """Return a text that is equal for the processes that can map each other's memory.

    Processes in other network namespaces count as other hosts, which they are to all other communication.
    """
    spaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ":".join(map(str, (boot, *spaces, os.getuid())))


class SharedMemory:
    """The mapped memory of a group. One rank makes it, and the others open it by its `name`."""

    def __init__(self, file: int, ranks: int, nonce: int) -> None:
        self._file = -1
        self._unmap: Callable[[], object] = lambda: None
        self.ranks = ranks
        self.nonce = nonce
        library = loaded_library()
        self.address = library.map(file, ranks)
        if self.address < 0:
            number = -self.address
            raise OSError(number, os.strerror(number))
        self._unmap = partial(library.unmap, self.address, ranks)
        self._file = file  # other ranks open it through this process

    @classmethod
    def make(cls, ranks: int) -> "SharedMemory":
        """Return new memory.

        Raises:
            OSError: there is no address space or no file descriptor for it.
        """
        library = loaded_library()
        file = os.memfd_create("shoal-comm", os.MFD_CLOEXEC)
        try:
            os.ftruncate(file, library.bytes(ranks))
            memory = cls(file, ranks, secrets.randbits(63))
        except OSError:
            os.close(file)
            raise
        library.prepare(memory.address, ranks, memory.nonce)
        return memory

    @classmethod
    def open(cls, name: str) -> "SharedMemory":
        """Return the memory that another process has made and named.

        Raises:
            OSError: it cannot be opened or mapped.
        """
        process, descriptor, ranks, nonce = map(int, name.split(":"))
        file = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(file, ranks, nonce)
        except OSError:
            os.close(file)
            raise

    @property
    def name(self) -> str:
        """The name by which other processes open it, until `close_file`."""
        return f"{os.getpid()}:{self._file}:{self.ranks}:{self.nonce}"

    def close_file(self) -> None:
        """Close the file, which stays mapped: all ranks have opened it. Idempotent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def __del__(self) -> None:
        self.close_file()
        self._unmap()

    def abort(self) -> None:
        """End all operations on this memory, current and future, on all ranks."""
        loaded_library().abort(self.address, self.ranks)


class _Attachment:
    """The state of one rank in the library, which counts and measures the operations (see `comm.base.Counter`).

    It outlives the communicator while what it has counted is still read.
    """

    def __init__(self, library: Library, context: int, rank: int, memory: SharedMemory) -> None:
        self.context = context
        self._library = library
        self._rank = rank
        self._memory = memory  # which has the positions

    def __del__(self) -> None:
        self._library.detach(self.context)

    def position(self) -> tuple[str, int]:
        return self.position_of(self._rank)

    def position_of(self, rank: int) -> tuple[str, int]:
        """Return the operation that a rank executes, "" between operations, and its number or that of the last one."""
        position = self._library.position(self.context, rank)
        return _OPERATIONS[position >> 48], position & (2**48 - 1)

    def totals(self) -> dict[str, OperationTotal]:
        found = {operation: self.total(operation) for operation in _OPERATIONS[1:]}
        return {operation: total for operation, total in found.items() if total.count}

    def total(self, operation: str) -> OperationTotal:
        numbers = (_LONG * (4 + self._memory.ranks))()
        self._library.totals(self.context, _OPERATIONS.index(operation), numbers)
        count, sent_bytes, ns, waited_ns, *waited_for = numbers
        if not count:
            return OperationTotal()
        waits = {rank: waited for rank, waited in enumerate(waited_for) if waited}
        return OperationTotal(count, sent_bytes, ns, waited_ns, waits)


class SharedMemoryComm:
    """One rank's communicator on shared memory. The library counts and measures its operations.

    Sends copy their tensor and do not wait, unless a quarter of a gigabyte is on its way to one rank.
    """

    overlaps = False

    def __init__(
        self,
        memory: SharedMemory,
        rank: int,
        processes: Sequence[int],
        *,
        numbers: Sequence[int] | None = None,
        timeout_s: float,
        spin: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Use the memory of a group.

        Args:
            processes: the process of each rank, so that an operation can tell when one of them has ended.
            numbers: of the ranks, for errors; by default 0, 1 and so on.
            spin: let a wait keep its core for a while: there is a core for each rank.
            progress: counts the operations; by default one of its own.

        Raises:
            CommError: the memory is that of another group.
        """
        self.rank = rank
        self.size = memory.ranks
        self.progress = Progress() if progress is None else progress
        self.backend = "shm"
        self._memory = memory
        self._processes = tuple(processes)
        self._numbers = tuple(range(self.size) if numbers is None else numbers)
        self._timeout_s = timeout_s
        self._library = library = loaded_library()
        self._summed = {dtype: code for dtype, code in _TYPES.items() if library.sums(code)}
        self._watched = [self._watch(process) for process in processes]
        self._context = library.attach(
            memory.address,
            rank,
            self.size,
            memory.nonce,
            (_INT * self.size)(*self._watched),
            int(timeout_s * 1e9),
            _SPIN_US * 1000 if spin else 0,
            torch.get_num_threads(),
        )
        if not self._context:
            raise CommError("the shared memory is that of another group")
        self._attachment = _Attachment(library, self._context, rank, memory)
        self.progress.take_from(self._attachment)

    def _watch(self, process: int) -> int:
        """Return a descriptor that tells of the end of a process, or -1."""
        if process == os.getpid():
            return -1
        try:
            return os.pidfd_open(process)
        except OSError:
            return -1

    def __del__(self) -> None:
        for descriptor in getattr(self, "_watched", ()):
            if descriptor >= 0:
                os.close(descriptor)

    def _run(self, operation: str, sent_bytes: int, function: Callable[..., int], *arguments: Any) -> None:
        """Execute an operation. `arguments`: of the function, behind the context.

        Raises:
            CommError: it has failed.
        """
        watch = self.progress.watch
        if watch is not None:
            watch.began(operation, sent_bytes)
        status = function(self._context, *arguments)
        if status:
            raise self._error(status)
        if watch is not None:
            watch.ended(operation)

    def _error(self, status: int) -> CommError:
        kind, whom = status & 0xFF, status >> 8
        where = f"rank {self._numbers[self.rank]}: {self.progress}"
        if kind == _ABORTED:
            return CommAborted(f"{where} was aborted")
        if kind == _TIMEOUT:
            return CommTimeout(f"{where} waited {self._timeout_s:g} s for {self._describe(whom)}")
        if kind == _DIED:
            return CommError(f"{where}: rank {self._numbers[whom]} (process {self._processes[whom]}) has ended")
        if kind == _MISMATCH:
            return CommError(
                f"{where}: rank {self._numbers[whom]} called another operation, or the same with another size"
            )
        return CommError(f"{where} cannot begin: an earlier operation has failed")

    def _describe(self, rank: int) -> str:
        """Describe a rank and what it is doing."""
        operation, number = self._attachment.position_of(rank)
        process = self._processes[rank]
        doing = f"in {operation} #{number}" if operation else f"after operation #{number}"
        with contextlib.suppress(OSError, IndexError):
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
            doing += {"T": ", stopped", "t": ", stopped by a debugger", "Z": ", ended"}.get(state, "")
        return f"rank {self._numbers[rank]} (process {process}, {doing})"

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        sent, address = reduced_bytes(x, self.size), x.data_ptr()
        self._run("all_reduce", sent, self._library.all_reduce, self._type(x), address, address, x.numel(), sent)
        return x

    def begin_all_reduce(self, x: Tensor) -> FinishedSum:
        return FinishedSum(self.all_reduce(x))

    def native_all_reduce(self, x: Tensor) -> NativeCall | None:
        if x.dtype not in self._summed:
            return None
        address, sent = x.data_ptr(), reduced_bytes(x, self.size)
        arguments = self._context, self._type(x), address, address, x.numel(), sent
        return self._library.recorded_all_reduce.call(arguments, self._error)

    def all_gather(self, x: Tensor, sizes: Sequence[int], dim: int = 0) -> Tensor:
        if dim != 0:
            return self.all_gather(x.transpose(0, dim), sizes).transpose(0, dim).contiguous()
        x = x.contiguous()
        out = x.new_empty((sum(sizes), *x.shape[1:]))
        row = _row_bytes(x)
        counts = (_LONG * self.size)(*(size * row for size in sizes))
        sent = x.nbytes * (self.size - 1)
        self._run("all_gather", sent, self._library.all_gather, x.data_ptr(), out.data_ptr(), counts, sent)
        return out

    def reduce_scatter(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        x = x.contiguous()
        out = x.new_empty((sizes[self.rank], *x.shape[1:]))
        row = _row_bytes(x) // x.itemsize
        counts = (_LONG * self.size)(*(size * row for size in sizes))
        arguments = self._type(x), x.data_ptr(), out.data_ptr(), counts
        sent = bytes_to_others(x, sizes, self.rank)
        self._run("reduce_scatter", sent, self._library.reduce_scatter, *arguments, sent)
        return out

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        x = x.contiguous()
        out = x.new_empty((sum(receive), *x.shape[1:]))
        row = _row_bytes(x)
        counts = ((_LONG * self.size)(*(size * row for size in sizes)) for sizes in (send, receive))
        sent = bytes_to_others(x, send, self.rank)
        self._run("all_to_all", sent, self._library.all_to_all, x.data_ptr(), out.data_ptr(), *counts, sent)
        return out

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        x = x.contiguous()
        sent = x.nbytes * (self.size - 1) if self.rank == root else 0
        self._run("broadcast", sent, self._library.broadcast, x.data_ptr(), x.nbytes, root, sent)
        return x

    def send(self, x: Tensor, to: int) -> PendingSend:
        x = x.contiguous()
        self._run("send", x.nbytes, self._library.send, x.data_ptr(), x.nbytes, to, x.nbytes)
        return _DONE

    def recv(self, x: Tensor, source: int) -> Tensor:
        self._run("recv", 0, self._library.receive, x.data_ptr(), x.nbytes, source)
        return x

    def barrier(self) -> None:
        self._run("barrier", 0, self._library.barrier)

    def abort(self) -> None:
        self._memory.abort()

    def _type(self, x: Tensor) -> int:
        code = self._summed.get(x.dtype)
        if code is None:
            raise CommError(f"rank {self._numbers[self.rank]}: {x.dtype} cannot be summed over shared memory")
        return code


class _DoneSend:
    """A send that has ended."""

    def wait(self) -> None:
        return


_DONE = _DoneSend()


def _row_bytes(x: Tensor) -> int:
    """Return the bytes of a row of x, which may have no rows."""
    return math.prod(x.shape[1:]) * x.itemsize
