"""Calls of C++ functions through ctypes, and the memory of their results, both of which a `Recorder` may take down.

A recorder belongs to the thread that has started it, so ranks that are threads do not disturb each other.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.native_call import NativeCall, WordsFunction


class NativeFunction:
    """A function of a library, which has a second form for calls that are recorded (`WordsFunction`)."""

    def __init__(
        self, library: ctypes.CDLL, name: str, arguments: Sequence[Any], result: type[ctypes.c_int32] | None = None
    ) -> None:
        """`result`: c_int32 if the function returns a status, which is 0 unless it failed."""
        self._name = name
        self._function = library[name]
        self._function.argtypes, self._function.restype = list(arguments), result
        self._words_function = WordsFunction(library, name, arguments)

    def __call__(self, *arguments: Any) -> Any:
        if _here.recorder is not None:
            _here.recorder.add_call(self._words_function.call(arguments, self._out_of_memory))
        return self._function(*arguments)

    def _out_of_memory(self, _: int) -> MemoryError:
        """Return the error of a call that is made again: arguments that are refused were refused the first time."""
        return MemoryError(f"out of memory for the intermediate results of {self._name}")


class Ranks(Protocol):
    """Ranks that add tensors, such as a communicator."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks. It may overwrite x."""

    def native_all_reduce(self, x: Tensor) -> NativeCall | None:
        """Return a call that replaces x, which is contiguous, by the sum over the ranks; None if there is none."""


class Recorder(Protocol):
    """Takes down what is called and allocated."""

    def add_call(self, call: NativeCall) -> None: ...

    def add_sum(self, ranks: Ranks, x: Tensor) -> Tensor: ...

    def add_operation(
        self, operation: Callable[..., Tensor], inputs: Sequence[Tensor], shape: Sequence[int]
    ) -> Tensor: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...


class _Here(threading.local):
    recorder: Recorder | None = None


_here = _Here()


def set_recorder(recorder: Recorder | None) -> None:
    """Let a recorder take down what this thread does from now on; None: nothing more."""
    _here.recorder = recorder


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return memory for the result of a C++ function."""
    if _here.recorder is not None:
        return _here.recorder.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype)


def sum_over(ranks: Ranks, x: Tensor) -> Tensor:
    """Return the sum of x over the ranks, and perhaps overwrite x. A replay adds again, in the same place."""
    if _here.recorder is not None:
        return _here.recorder.add_sum(ranks, x)
    return ranks.all_reduce(x)


def compute(operation: Callable[..., Tensor], x: Tensor, shape: Sequence[int], *others: Tensor) -> Tensor:
    """Return the result of an operation of Python on x and other tensors, of this shape and the dtype of x.

    A replay calls it again. So it must depend on nothing that changes but these tensors, the KV cache and the batch of
    the step, and exchange nothing with other ranks.
    """
    if _here.recorder is not None:
        return _here.recorder.add_operation(operation, (x, *others), shape)
    return operation(x, *others)
