"""Recordings of the layers of a step, which are replayed over the same memory with hardly any Python in between.

Between two layers' matrix products a step calls many small functions, and calling them from Python takes longer than
some of them do. For a batch of a given size all these calls have the same arguments in each step, if the tensors lie
in the same memory. So a `Recorder` takes down the calls of one step, and a `Recording` makes the same calls again:
those of C++ functions in one go. In between, Python makes the exchanges with other ranks, and the matrix products that
PyTorch computes.

A step can be recorded if PyTorch itself computes nothing else in it: the recorder sees every operation of PyTorch, and
refuses those that do more than look at a tensor in another way.
"""

import ctypes
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.kernels.native import load_native_library
from shoal.kernels.native_calls import NativeFunction, set_recorder

_ALIGNMENT = 64
_SLAB_BYTES = 1 << 20
_ALL_DONE = -1

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

    functions: list[NativeFunction] = field(default_factory=list)
    words: list[bytes] = field(default_factory=list)
    then: Callable[[], None] | None = None


class Recorder(TorchDispatchMode):
    """Takes down what this thread does until the end of the `with` block.

    Exchanges with other ranks are not made meanwhile: the first replay makes them. So results are wrong if there are
    any, and every rank may decide for itself whether it replays, as the exchanges are the same in both cases.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool
        self._segments = [_Segment()]
        self._at_work = False
        self._kept: list[Any] = []  # what the words of the calls point to, beside the pool

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
        if func not in _VIEWS and not self._at_work:
            raise NotRecordable(f"PyTorch computes {func}")
        return func(*args, **(kwargs or {}))

    def add_call(self, function: NativeFunction, arguments: Sequence[Any]) -> None:
        segment = self._segments[-1]
        segment.functions.append(function)
        segment.words.append(function.pack(arguments))
        self._kept += [argument for argument in arguments if isinstance(argument, ctypes.Array)]

    def add_exchange(self, exchange: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if not x.is_contiguous():
            raise NotRecordable("a tensor for other ranks is not contiguous")

        self._at_work = True
        target = self._pool.alias(x)
        self._at_work = False

        self._end_segment(_Exchange(exchange, target))
        return x

    def add_operation(self, operation: Callable[[Tensor], Tensor], x: Tensor, shape: Sequence[int]) -> Tensor:
        if not x.is_contiguous():
            raise NotRecordable("the input of an operation is not contiguous")
        self._at_work = True
        out = self._pool.empty(shape, x.dtype)
        source, target = self._pool.alias(x), self._pool.alias(out)

        def compute() -> None:
            target.copy_(operation(source))

        compute()
        self._at_work = False
        self._end_segment(compute)
        return out

    def _end_segment(self, then: Callable[[], None]) -> None:
        self._segments[-1].then = then
        self._segments.append(_Segment())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._at_work = True
        made = self._pool.empty(shape, dtype)
        self._at_work = False
        return made

    def recording(self) -> "Recording":
        """Return what was recorded.

        Raises:
            NotRecordable: there is nothing.
        """
        if not self._segments[0].functions:
            raise NotRecordable("no kernel in C++ is called")
        return Recording(self._segments, self._kept, self._pool)


class _Exchange:
    """An exchange with other ranks, whose result overwrites the tensor that was sent."""

    def __init__(self, exchange: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._exchange = exchange
        self._x = x
        self._in_place = False  # not known before the first call

    def __call__(self) -> None:
        # Where results are new tensors, other ranks may still read what was sent while this rank goes on.
        sent = self._x if self._in_place else self._x.clone()
        found = self._exchange(sent)
        self._in_place = found.data_ptr() == sent.data_ptr()
        if found is not self._x:
            self._x.copy_(found)


class _Call(ctypes.Structure):
    """A call as C++ reads it."""

    _fields_ = (("function", ctypes.c_void_p), ("words", ctypes.c_void_p))


class Recording:
    """Calls that can be made again."""

    def __init__(self, segments: Sequence[_Segment], kept: list[Any], pool: Pool) -> None:
        self._kept = [kept, pool]
        self._replay = _replay()
        self._parts = [self._part(segment) for segment in segments]

    def _part(self, segment: _Segment) -> tuple[Any, list[NativeFunction], Callable[[], None] | None]:
        calls = (_Call * len(segment.functions))()
        for call, function, words in zip(calls, segment.functions, segment.words, strict=True):
            buffer = ctypes.create_string_buffer(words, len(words))
            self._kept.append(buffer)
            call.function, call.words = function.address, ctypes.addressof(buffer)
        return calls, segment.functions, segment.then

    def replay(self) -> None:
        """Make the calls again.

        Raises:
            MemoryError: there is no memory for the intermediate results of a C++ function.
            CommError: an exchange with other ranks has failed.
        """
        for calls, functions, then in self._parts:
            failed = self._replay(calls, len(calls))
            if failed != _ALL_DONE:
                # Arguments that a function refuses were refused when the step was recorded.
                raise MemoryError(f"out of memory for the intermediate results of {functions[failed].name}")
            if then is not None:
                then()


@cache
def _replay() -> Any:
    """Return the C++ function that makes calls again. Whoever has recorded calls of C++ functions has its library."""
    library, reason = load_native_library()
    if library is None:
        raise NotRecordable(reason)
    replay = library.shoal_replay
    replay.argtypes, replay.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    return replay
