"""The C++ implementation of linear layers with quantized weights, `csrc/quantized.cpp` and others, through ctypes."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.native_calls import NativeFunction, empty
from shoal.kernels.top_outputs import TopOutputs
from shoal.native_library import bind, open_library

ABI_VERSION = 4
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
INT, LONG, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p

_NUMBERS_AT_A_TIME = 1 << 22  # inputs and outputs in float32 where they are converted
_LEVELS = ("portable", "avx2", "avx512_vnni")  # the instructions that are used, by their number in C++
_MULTIPLY = [INT, POINTER, POINTER, LONG, POINTER, POINTER, LONG]
_TOP = [INT, POINTER, POINTER, LONG, POINTER, LONG, POINTER, POINTER, LONG]
_SIGNATURES: dict[str, list[Any]] = {
    "shoal_int8_top": _TOP,
    "shoal_int4_top": _TOP,
    "shoal_int8_pack": [POINTER, LONG, LONG, POINTER, POINTER, LONG],
    "shoal_int4_quantize": [INT, POINTER, LONG, LONG, LONG, POINTER, POINTER, POINTER, LONG],
    "shoal_int4_pack": [POINTER, POINTER, POINTER, POINTER, LONG],
}

threads = torch.get_num_threads


class QuantizedLibrary:
    """The opened library; `load_quantized` opens it. Threads may share one object.

    `levels` are the sets of instructions that this CPU can run, the fastest last.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.int8_pack = _function(library, "shoal_int8_pack")
        self.int8_linear = NativeFunction(library, "shoal_int8_linear", _MULTIPLY)
        self.int8_top = _function(library, "shoal_int8_top", INT)
        self.int4_quantize = _function(library, "shoal_int4_quantize")
        self.int4_pack = _function(library, "shoal_int4_pack")
        self.int4_linear = NativeFunction(library, "shoal_int4_linear", _MULTIPLY)
        self.int4_top = _function(library, "shoal_int4_top", INT)
        self.levels = _LEVELS[: int(library.shoal_quantized_level()) + 1]


@cache
def load_quantized() -> tuple[QuantizedLibrary | None, str]:
    """Return the library, or None, and a few words for the log: its instructions, or why PyTorch computes instead."""
    library, reason = open_library(Path(__file__).parent, "_quantized", "shoal_quantized_abi_version", ABI_VERSION)
    if library is None:
        return None, f"PyTorch: {reason}"
    found = QuantizedLibrary(library)
    return found, found.levels[-1]


def level_number(level: str) -> int:
    return _LEVELS.index(level)


class NativeLinear:
    """A linear layer that C++ computes.

    Args:
        multiply: the function, with the arguments of `_MULTIPLY`.
        top: the function that finds top outputs, with the arguments of `_TOP`.
        layer: what it reads about the layer.
        outputs: the number of outputs.
        row_bytes: the bytes that it needs for each row.
        kept: the tensors to which the layer has pointers.
    """

    def __init__(
        self,
        multiply: NativeFunction,
        top: Callable[..., int],
        layer: ctypes.Structure,
        outputs: int,
        row_bytes: int,
        kept: tuple[Tensor | None, ...],
    ) -> None:
        self._multiply = multiply
        self._top = top
        self._layer = layer
        self._address = ctypes.addressof(layer)
        self._outputs = outputs
        self._row_bytes = row_bytes
        self._kept = kept

    def __call__(self, x: Tensor) -> Tensor:
        code = TYPE_CODES.get(x.dtype)
        if code is None:  # float16
            return in_parts(x, self._outputs, lambda part: self(part.float()))
        x = x.contiguous()
        rows = x.shape[0]
        out = empty((rows, self._outputs), x.dtype)
        if rows:
            scratch = empty((rows * self._row_bytes,), torch.uint8)
            self._multiply(code, self._address, x.data_ptr(), rows, scratch.data_ptr(), out.data_ptr(), threads())
        return out

    def top(self, x: Tensor, start: int) -> TopOutputs | None:
        """Return the top output of each row (see `TopLinear`); None for a type that C++ does not compute."""
        code = TYPE_CODES.get(x.dtype)
        if code is None:
            return None
        x = x.contiguous()
        rows = x.shape[0]
        values, ids = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
        if rows:
            scratch = torch.empty(rows * self._row_bytes, dtype=torch.uint8)
            status = self._top(
                *(code, self._address, x.data_ptr(), rows, scratch.data_ptr(), start),
                *(values.data_ptr(), ids.data_ptr(), threads()),
            )
            if status:
                raise MemoryError(f"out of memory for the top outputs of {rows} rows")
        return values, ids


def in_parts(x: Tensor, outputs: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `multiply` of all rows, in the type of `x`; it is called with some rows at a time, to save memory."""
    out = x.new_empty((len(x), outputs))
    rows = max(_NUMBERS_AT_A_TIME // (outputs + x.shape[1]), 1)
    for start in range(0, len(x), rows):
        out[start : start + rows] = multiply(x[start : start + rows])
    return out


def _function(library: ctypes.CDLL, name: str, result: type[ctypes.c_int32] | None = None) -> Callable[..., Any]:
    return bind(library, name, _SIGNATURES[name], result)
