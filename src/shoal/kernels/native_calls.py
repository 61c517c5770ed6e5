"""Calls of C++ functions through ctypes, and the memory of their results, both of which a `Recorder` may take down.

A recorder belongs to the thread that has started it, so ranks that are threads do not disturb each other.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_FORMATS: dict[Any, str] = {ctypes.c_int32: "q", ctypes.c_int64: "q", ctypes.c_void_p: "Q", ctypes.c_float: "f4x"}


class NativeFunction:
    """A function of a library. A second one, with `_words` behind its name, takes the arguments as words (replay.h)."""

    def __init__(
        self, library: ctypes.CDLL, name: str, arguments: Sequence[Any], result: type[ctypes.c_int32] | None = None
    ) -> None:
        """`result`: c_int32 if the function returns a status, which is 0 unless it failed."""
        self.name = name
        self._function = library[name]
        self._function.argtypes, self._function.restype = list(arguments), result
        self._words = struct.Struct("<" + "".join(_FORMATS[kind] for kind in arguments))
        self.address = ctypes.cast(library[f"{name}_words"], ctypes.c_void_p).value or 0

    def __call__(self, *arguments: Any) -> Any:
        if _here.recorder is not None:
            _here.recorder.add_call(self, arguments)
        return self._function(*arguments)

    def pack(self, arguments: Sequence[Any]) -> bytes:
        """Return the arguments as words."""
        return self._words.pack(*map(_number, arguments))


def _number(argument: Any) -> Any:
    if argument is None:
        return 0
    return ctypes.addressof(argument) if isinstance(argument, ctypes.Array) else argument


class Recorder(Protocol):
    """Takes down what is called and allocated."""

    def add_call(self, function: NativeFunction, arguments: Sequence[Any]) -> None: ...

    def add_exchange(self, exchange: Callable[[Tensor], Tensor], x: Tensor) -> Tensor: ...

    def add_operation(self, operation: Callable[[Tensor], Tensor], x: Tensor, shape: Sequence[int]) -> Tensor: ...

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


def exchange(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the result of an operation with other ranks, such as an all-reduce, which has the shape and dtype of x.

    The operation may overwrite x. A replay calls it again, in the same place.
    """
    if _here.recorder is not None:
        return _here.recorder.add_exchange(operation, x)
    return operation(x)


def compute(operation: Callable[[Tensor], Tensor], x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the result of an operation of PyTorch, of this shape and the dtype of x. A replay calls it again.

    The operation must depend on nothing that changes but x.
    """
    if _here.recorder is not None:
        return _here.recorder.add_operation(operation, x, shape)
    return operation(x)
