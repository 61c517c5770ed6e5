"""Linear layers in bfloat16 for CPUs with AVX2, AVX-512 BF16 or AMX, in C++ (`csrc/bf16_linear.cpp`).

A row's result has the same bits in any batch and with any number of threads.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.native_calls import NativeFunction, compute, empty
from shoal.kernels.top_outputs import TopOutputs
from shoal.native_library import bind, open_library

ABI_VERSION = 4
NO_INSTRUCTIONS = "the CPU has no AVX2"

_LEVELS = ("none", "avx2", "avx512_bf16", "amx_bf16")  # the instructions that are used, by their number in C++
_OUTPUTS_OF_BLOCK, _OUTPUTS_OF_PANEL, _INPUTS_OF_STEP = 16, 32, 32  # as in csrc/bf16_tiles.h

_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Layer(ctypes.Structure):
    """A layer as C++ reads it."""

    _fields_ = (
        ("packed", _POINTER),
        ("bias", _POINTER),
        ("steps", _LONG),
        ("outputs", _LONG),
        ("level", _INT),
    )


class Bf16Library:
    """The library of the C++ implementation; `load_bf16` opens it. Threads may share one object.

    `levels` are the sets of instructions that this CPU can run, the fastest last.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.pack = bind(library, "shoal_bf16_pack", [_POINTER, _LONG, _LONG, _POINTER, _LONG])
        self.multiply = NativeFunction(library, "shoal_bf16_linear", [_POINTER, _POINTER, _LONG, _POINTER, _LONG], _INT)
        self.multiply_group = bind(
            library, "shoal_bf16_group", [_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG], _INT
        )
        self.top = bind(library, "shoal_bf16_top", [_POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG], _INT)
        self.levels = _LEVELS[1 : int(library.shoal_bf16_level()) + 1]


class NativeBf16Linear:
    """A linear layer with a packed copy of its weight. It keeps no reference to the weight that is passed in.

    Sums are in float32, and rounded once. With AVX-512 BF16 and AMX subnormal numbers count as 0.

    Args:
        weight: bfloat16 [outputs, inputs].
        bias: bfloat16 [outputs].
        library: the implementation.
        level: the instructions to use, one of the library's levels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, library: Bf16Library, level: str) -> None:
        outputs, inputs = weight.shape
        self.outputs, self.inputs = outputs, inputs
        self.library = library
        steps = -(-inputs // _INPUTS_OF_STEP)
        self._padding = steps * _INPUTS_OF_STEP - inputs
        self._packed = weight.new_empty(_multiple(outputs, _OUTPUTS_OF_BLOCK) * steps * _INPUTS_OF_STEP)
        panels = _multiple(outputs, _OUTPUTS_OF_PANEL)
        self._bias = None if bias is None else F.pad(bias.float(), (0, panels - outputs))
        weight = weight.contiguous()
        library.pack(weight.data_ptr(), outputs, inputs, self._packed.data_ptr(), _threads())
        self._layer = _Layer(
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            steps,
            outputs,
            _LEVELS.index(level),
        )
        self.address = ctypes.addressof(self._layer)

    def __call__(self, x: Tensor) -> Tensor:
        x = self.padded(x)
        rows = x.shape[0]
        out = empty((rows, self.outputs), x.dtype)
        if rows:
            _check(self.library.multiply(self.address, x.data_ptr(), rows, out.data_ptr(), _threads()))
        return out

    def top(self, x: Tensor, start: int) -> TopOutputs:
        """Return the top output of each row (see `TopLinear`)."""
        x = self.padded(x)
        rows = x.shape[0]
        values, ids = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
        if rows:
            _check(
                self.library.top(self.address, x.data_ptr(), rows, start, values.data_ptr(), ids.data_ptr(), _threads())
            )
        return values, ids

    def padded(self, x: Tensor) -> Tensor:
        """Return rows as C++ reads them: contiguous, and with as many inputs as the packed weight.

        Raises:
            ValueError: they have another type or number of inputs.
        """
        if x.dtype is not torch.bfloat16 or x.shape[1] != self.inputs:
            raise ValueError(f"{list(x.shape)} in {x.dtype} for a linear layer with {self.inputs} bfloat16 inputs")
        if not self._padding:
            return x.contiguous()
        return compute(lambda rows: F.pad(rows, (0, self._padding)), x, (len(x), x.shape[1] + self._padding))


class NativeBf16Group:
    """Layers of one shape that are computed in one call, each with rows of its own."""

    def __init__(self, layers: Sequence[NativeBf16Linear]) -> None:
        self._layers = layers
        self._addresses = (ctypes.c_void_p * len(layers))(*(layer.address for layer in layers))

    def __call__(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        first = self._layers[0]
        x = first.padded(x)
        out = x.new_empty((x.shape[0], first.outputs))
        if len(counts) != len(self._layers) or sum(counts) != len(x):
            raise ValueError(f"{len(x)} rows in {len(counts)} parts of {sum(counts)} for {len(self._layers)} layers")
        if len(x):
            of_layers = (ctypes.c_int64 * len(counts))(*counts)
            _check(
                first.library.multiply_group(
                    self._addresses, of_layers, len(counts), x.data_ptr(), out.data_ptr(), _threads()
                )
            )
        return out


@cache
def load_bf16() -> tuple[Bf16Library | None, str]:
    """Return the library, or None, and a few words: the instructions that it uses, or why it cannot be used."""
    library, reason = open_library(Path(__file__).parent, "_bf16", "shoal_bf16_abi_version", ABI_VERSION)
    if library is None:
        return None, reason
    found = Bf16Library(library)
    return (found, found.levels[-1]) if found.levels else (None, NO_INSTRUCTIONS)


def _check(status: int) -> None:
    if status != 0:
        raise MemoryError("out of memory for the rows of a linear layer in float32")


def _multiple(number: int, unit: int) -> int:
    return -(-number // unit) * unit


_threads = torch.get_num_threads
