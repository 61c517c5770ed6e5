"""Linear layers with int8 weights, which quantize each row of activations as it comes (LLM.int8(), Dettmers, 2022).

There are two implementations with the same bits: C++ for the CPU (`csrc/int8_linear.cpp`) and PyTorch. Sums of products
of integers are exact, so a row's result has the same bits in any batch.
"""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.linear_weights import LinearWeights, quantize_rows
from shoal.kernels.quantized_library import (
    INT,
    LONG,
    POINTER,
    NativeLinear,
    QuantizedLibrary,
    in_parts,
    level_number,
    threads,
)
from shoal.kernels.weight_format import INT8, padded_outputs


class _Layer(ctypes.Structure):
    """A layer as C++ reads it."""

    _fields_ = (
        ("packed", POINTER),
        ("offsets", POINTER),
        ("scales", POINTER),
        ("bias", POINTER),
        ("inputs", LONG),
        ("outputs", LONG),
        ("level", INT),
    )


class NativeInt8Linear(NativeLinear):
    """The C++ implementation, with a packed copy of the codes. It keeps no reference to the weight that is passed in.

    Args:
        weight: int8 with one scale for each output; see `WeightFormat.takes` for its shape.
        bias: [outputs].
        library: the implementation.
        level: the instructions to use, one of the library's levels.
    """

    def __init__(self, weight: LinearWeights, bias: Tensor | None, library: QuantizedLibrary, level: str) -> None:
        outputs, inputs = weight.codes.shape
        codes = weight.codes.contiguous()
        padding = (0, padded_outputs(outputs) - outputs)
        packed = torch.empty(INT8.packed_bytes((outputs, inputs)), dtype=torch.int8)
        offsets = torch.empty(padded_outputs(outputs), dtype=torch.int32)
        scales = F.pad(weight.scales.flatten(), padding)
        added = None if bias is None else F.pad(bias.float(), padding)
        library.int8_pack(codes.data_ptr(), outputs, inputs, packed.data_ptr(), offsets.data_ptr(), threads())
        layer = _Layer(
            packed.data_ptr(),
            offsets.data_ptr(),
            scales.data_ptr(),
            None if added is None else added.data_ptr(),
            inputs,
            outputs,
            level_number(level),
        )
        kept = (packed, offsets, scales, added)
        super().__init__(library.int8_linear, library.int8_top, layer, outputs, INT8.row_bytes(inputs), kept)


class TorchInt8Linear:
    """The PyTorch implementation, for any shape. See `NativeInt8Linear` for the arguments."""

    def __init__(self, weight: LinearWeights, bias: Tensor | None) -> None:
        self._codes = weight.codes
        self._scales = weight.scales.flatten()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return in_parts(x, len(self._codes), self._multiply)

    def _multiply(self, x: Tensor) -> Tensor:
        codes, scales = quantize_rows(x)
        out = torch._int_mm(codes, self._codes.t()).float().mul_(scales).mul_(self._scales)
        return out if self._bias is None else out.add_(self._bias)
