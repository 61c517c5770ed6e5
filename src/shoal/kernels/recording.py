"""Recordings of the layers of a step, which are replayed over the same memory with hardly any Python in between.

Between two layers' matrix products a step calls many small functions, and calling them from Python takes longer than
some of them do. For a batch of a given size all these calls have the same arguments in each step, if the tensors lie
in the same memory. So a `Recorder` takes down the calls of one step, and a `Recording` makes the same calls again:
those of C++ functions in one go. In between, Python computes what is declared with `compute`, such as the matrix
products of PyTorch, and adds over the ranks where their communicator has no C++ function for it.

A step can be recorded if PyTorch itself computes nothing else in it: the recorder sees every operation of PyTorch, and
refuses those that do more than look at a tensor in another way.
"""

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.kernels.native import load_native_library
from shoal.kernels.native_calls import Ranks, set_recorder
from shoal.native_call import NativeCall

_ALIGNMENT = 64
_SLAB_BYTES = 1 << 20

_aten = torch.ops.aten
# The operations that compute nothing.
_VIEWS = {
    _aten.view.default,
    _aten.view.dtype,
    _aten._unsafe_view.default,
    _aten.alias.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.squeeze.dim,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unsqueeze.default,
}


class NotRecordable(Exception):
    """The step does something that a recording cannot repeat."""


class Pool:
    """Memory for the results of a recorded step, of which parts are used again as in the step itself.

    All recordings of a rank may share a pool, since they are replayed one at a time.
    """

    def __init__(self) -> None:
        self._slabs: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        self._free: dict[int, list[tuple[int, int]]] = defaultdict(list)  # size -> (slab, offset)
        self._ends: list[int] = []  # of the used part of each slab

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor, whose memory is used again when no tensor refers to it any more."""
        nbytes = math.prod(shape) * dtype.itemsize
        size = 1 << (max(nbytes, _ALIGNMENT) - 1).bit_length()  # few sizes, which steps of other sizes use again
        slab, offset = self._free[size].pop() if self._free[size] else self._unused(size)
        part = self._slabs[slab][offset : offset + nbytes]
        # The storage of the tensor, which its views share, is what keeps `part`.
        weakref.finalize(part, self._free[size].append, (slab, offset)).atexit = False
        return torch.from_numpy(part).view(dtype).view(*shape)

    def alias(self, x: Tensor) -> Tensor:
        """Return a contiguous tensor of this pool again, as one that does not keep its memory from being used again."""
        for slab in self._slabs:
            offset = x.data_ptr() - slab.ctypes.data
            if 0 <= offset < slab.nbytes:
                return torch.from_numpy(slab[offset : offset + x.nbytes]).view(x.dtype).view(x.shape)
        return x

    def _unused(self, size: int) -> tuple[int, int]:
        for slab, end in enumerate(self._ends):
            if end + size <= self._slabs[slab].nbytes:
                self._ends[slab] += size
                return slab, end
        memory = np.empty(max(size, _SLAB_BYTES) + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        self._slabs.append(memory[start : start + max(size, _SLAB_BYTES)])
        self._ends.append(size)
        return len(self._slabs) - 1, 0

    def fill(self, byte: int) -> None:
        """Overwrite all memory."""
        for slab in self._slabs:
            slab.fill(byte)


@dataclass(slots=True)
class _Segment:
    """Calls of C++ functions in a row, and what is done in Python after them."""

    calls: list[NativeCall] = field(default_factory=list)
    then: Callable[[], None] | None = None


class Recorder(TorchDispatchMode):
    """Takes down what this thread does until the end of the `with` block.

    Nothing is added over the ranks meanwhile: the first replay does that. So results are wrong if something is, and
    every rank may decide for itself whether it replays, as the exchanges are the same in both cases.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool
        self._segments = [_Segment()]
        self._paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell PyTorch that its compiler need not be kept away from this class: that would load the compiler."""
        return False

    def __enter__(self) -> Self:
        set_recorder(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        set_recorder(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _VIEWS and not self._paused:
            raise NotRecordable(f"PyTorch computes {func}")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Record nothing in this block."""
        self._paused = True
        set_recorder(None)
        yield
        set_recorder(self)
        self._paused = False

    def add_call(self, call: NativeCall) -> None:
        self._segments[-1].calls.append(call)

    def add_sum(self, ranks: Ranks, x: Tensor) -> Tensor:
        if not x.is_contiguous():
            raise NotRecordable("a tensor for other ranks is not contiguous")
        with self._pause():
            target = self._pool.alias(x)
            call = ranks.native_all_reduce(target)
        if call is None:
            self._end_segment(_Sum(ranks.all_reduce, target))
        else:
            self.add_call(call)
        return x

    def add_operation(self, operation: Callable[..., Tensor], inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        if not all(x.is_contiguous() for x in inputs):
            raise NotRecordable("the input of an operation is not contiguous")
        with self._pause():
            out = self._pool.empty(shape, inputs[0].dtype)
            sources, target = [self._pool.alias(x) for x in inputs], self._pool.alias(out)

            def compute() -> None:
                target.copy_(operation(*sources))

            compute()
        self._end_segment(compute)
        return out

    def _end_segment(self, then: Callable[[], None]) -> None:
        self._segments[-1].then = then
        self._segments.append(_Segment())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        with self._pause():
            return self._pool.empty(shape, dtype)

    def recording(self) -> "Recording":
        """Return what was recorded.

        Raises:
            NotRecordable: there is nothing.
        """
        if not self._segments[0].calls:
            raise NotRecordable("no kernel in C++ is called")
        return Recording(self._segments, self._pool)


class _Sum:
    """An addition over ranks in Python, whose result overwrites the tensor that was sent."""

    def __init__(self, all_reduce: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._all_reduce = all_reduce
        self._x = x
        self._in_place = False  # not known before the first call

    def __call__(self) -> None:
        # Where results are new tensors, other ranks may still read what was sent while this rank goes on.
        sent = self._x if self._in_place else self._x.clone()
        found = self._all_reduce(sent)
        self._in_place = found.data_ptr() == sent.data_ptr()
        if found is not self._x:
            self._x.copy_(found)


class _Call(ctypes.Structure):
    """A call as C++ reads it."""

    _fields_ = (("function", ctypes.c_void_p), ("words", ctypes.c_void_p))


class _Calls:
    """Calls of C++ functions in a row, which are made by one call of another one."""

    def __init__(self, calls: Sequence[NativeCall]) -> None:
        self._calls = list(calls)
        self._words = [ctypes.create_string_buffer(call.words, len(call.words)) for call in calls]
        self._packed = (_Call * len(calls))()
        for packed, call, words in zip(self._packed, calls, self._words, strict=True):
            packed.function, packed.words = call.address, ctypes.addressof(words)
        self._done = ctypes.c_int64()
        self._arguments = self._packed, len(calls), ctypes.byref(self._done)
        self._replay = _replay()

    def __call__(self) -> None:
        status = self._replay(*self._arguments)
        if status:
            raise self._calls[self._done.value].error(status)


class Recording:
    """Calls that can be made again."""

    def __init__(self, segments: Sequence[_Segment], pool: Pool) -> None:
        self._pool = pool
        self._parts: list[Callable[[], None]] = []
        for segment in segments:
            if segment.calls:
                self._parts.append(_Calls(segment.calls))
            if segment.then is not None:
                self._parts.append(segment.then)

    @property
    def parts(self) -> int:
        """The number of calls that a replay makes from Python."""
        return len(self._parts)

    def replay(self) -> None:
        """Make the calls again.

        Raises:
            MemoryError: there is no memory for the intermediate results of a C++ function.
            CommError: the addition over the ranks has failed.
        """
        for part in self._parts:
            part()


@cache
def _replay() -> Any:
    """Return the C++ function that makes calls again. Whoever has recorded calls of C++ functions has its library."""
    library, reason = load_native_library()
    if library is None:
        raise NotRecordable(reason)
    replay = library.shoal_replay
    replay.argtypes, replay.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p], ctypes.c_int32
    return replay
