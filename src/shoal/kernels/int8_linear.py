"""Linear layers with int8 weights, which quantize each row of activations as it comes (LLM.int8(), Dettmers, 2022).

There are two implementations with the same bits: C++ for the CPU (`csrc/int8_linear.cpp`, called through ctypes) and
PyTorch. Sums of products of integers are exact, so a row's result has the same bits in any batch.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.linear_weights import LinearWeights, quantize_rows
from shoal.kernels.native_calls import NativeFunction, empty
from shoal.kernels.weight_format import INT8, packed_size, padded_outputs
from shoal.native_library import open_library

ABI_VERSION = 2

_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
_NUMBERS_AT_A_TIME = 1 << 22  # inputs and outputs in float32 where they are converted
_LEVELS = ("portable", "avx512_vnni")  # the instructions that are used, by their number in C++

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "shoal_int8_pack": [_POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG],
    "shoal_int8_linear": [_INT, _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG],
}


class _Layer(ctypes.Structure):
    """A layer as C++ reads it."""

    _fields_ = (
        ("packed", _POINTER),
        ("offsets", _POINTER),
        ("scales", _POINTER),
        ("bias", _POINTER),
        ("inputs", _LONG),
        ("outputs", _LONG),
        ("level", _INT),
    )


class Int8Library:
    """The library of the C++ implementation; `load_int8` opens it. Threads may share one object.

    `levels` are the sets of instructions that this CPU can run, the fastest last.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.pack = _function(library, "shoal_int8_pack")
        self.multiply = NativeFunction(library, "shoal_int8_linear", _SIGNATURES["shoal_int8_linear"])
        self.levels = _LEVELS[: int(library.shoal_int8_level()) + 1]


class NativeInt8Linear:
    """The C++ implementation, with a packed copy of the codes. It keeps no reference to the weight that is passed in.

    Args:
        weight: int8 with one scale for each output; see `WeightFormat.takes` for its shape.
        bias: [outputs].
        library: the implementation.
        level: the instructions to use, one of the library's levels.
    """

    def __init__(self, weight: LinearWeights, bias: Tensor | None, library: Int8Library, level: str) -> None:
        outputs, inputs = weight.codes.shape
        codes = weight.codes.contiguous()
        self._outputs = outputs
        self._row_bytes = INT8.row_bytes(inputs)
        padding = (0, padded_outputs(outputs) - outputs)
        self._packed = torch.empty(packed_size(outputs, inputs), dtype=torch.int8)
        self._offsets = torch.empty(padded_outputs(outputs), dtype=torch.int32)
        self._scales = F.pad(weight.scales.flatten(), padding)
        self._bias = None if bias is None else F.pad(bias.float(), padding)
        library.pack(codes.data_ptr(), outputs, inputs, self._packed.data_ptr(), self._offsets.data_ptr(), _threads())
        self._multiply = library.multiply
        self._layer = _Layer(
            self._packed.data_ptr(),
            self._offsets.data_ptr(),
            self._scales.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            inputs,
            outputs,
            _LEVELS.index(level),
        )
        self._address = ctypes.addressof(self._layer)

    def __call__(self, x: Tensor) -> Tensor:
        code = _TYPE_CODES.get(x.dtype)
        if code is None:  # float16
            return _in_parts(x, self._outputs, lambda part: self(part.float()))
        x = x.contiguous()
        rows = x.shape[0]
        out = empty((rows, self._outputs), x.dtype)
        if rows:
            scratch = empty((rows * self._row_bytes,), torch.uint8)
            self._multiply(code, self._address, x.data_ptr(), rows, scratch.data_ptr(), out.data_ptr(), _threads())
        return out


class TorchInt8Linear:
    """The PyTorch implementation, for any shape. See `NativeInt8Linear` for the arguments."""

    def __init__(self, weight: LinearWeights, bias: Tensor | None) -> None:
        self._codes = weight.codes
        self._scales = weight.scales.flatten()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return _in_parts(x, len(self._codes), self._multiply)

    def _multiply(self, x: Tensor) -> Tensor:
        codes, scales = quantize_rows(x)
        out = torch._int_mm(codes, self._codes.t()).float().mul_(scales).mul_(self._scales)
        return out if self._bias is None else out.add_(self._bias)


def _in_parts(x: Tensor, outputs: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `multiply` of all rows, in the type of `x`; it is called with some rows at a time, to save memory."""
    out = x.new_empty((len(x), outputs))
    rows = max(_NUMBERS_AT_A_TIME // (outputs + x.shape[1]), 1)
    for start in range(0, len(x), rows):
        out[start : start + rows] = multiply(x[start : start + rows])
    return out


Int8Linear = NativeInt8Linear | TorchInt8Linear


def make_int8_linear(weight: LinearWeights, bias: Tensor | None) -> Int8Linear:
    """Return a linear layer with this weight. The caller should drop the weight, of which there may be two copies.

    Raises:
        ValueError: the weight is not int8 with one scale for each output.
    """
    if weight.format is not INT8 or weight.scales.shape[1] != 1 or weight.zeros is not None:
        raise ValueError(f"no kernel for weights in {weight.format} with scales of shape {list(weight.scales.shape)}")
    library, _ = load_int8()
    if library is None:
        return TorchInt8Linear(weight, bias)
    return NativeInt8Linear(weight, bias, library, library.levels[-1])


@cache
def load_int8() -> tuple[Int8Library | None, str]:
    """Return the library, or None, and a few words for the log: its instructions, or why PyTorch computes instead."""
    library, reason = open_library(Path(__file__).parent, "_int8", "shoal_int8_abi_version", ABI_VERSION)
    if library is None:
        return None, f"PyTorch: {reason}"
    found = Int8Library(library)
    return found, found.levels[-1]


def _function(library: ctypes.CDLL, name: str) -> Callable[..., Any]:
    function = library[name]
    function.argtypes = _SIGNATURES[name]
    function.restype = None
    return function


_threads = torch.get_num_threads
