"""Linear layers with weights of 4 bits, in groups of inputs with a scale and a zero each.

Each row of activations is quantized as it comes, to 8 bits and in the same groups. There are two implementations with
the same bits: C++ for the CPU (`csrc/int4_linear.cpp`, which has the formula) and PyTorch. The sum of a group is exact,
and groups are added in order, so a row's result has the same bits in any batch.
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
from shoal.kernels.weight_format import padded_outputs

_LARGEST_GROUP = 128  # as in csrc/int4_linear.cpp
_ZERO_BITS = 0xFF  # the bits of a word that have the zero; the others are the scale


class _Layer(ctypes.Structure):
    """A layer as C++ reads it."""

    _fields_ = (
        ("packed", POINTER),
        ("bias", POINTER),
        ("inputs", LONG),
        ("outputs", LONG),
        ("group", LONG),
        ("level", INT),
    )


class NativeInt4Linear(NativeLinear):
    """The C++ implementation, with a packed copy of the codes. It keeps no reference to the weight that is passed in.

    Args:
        weight: in a format with 4 bits; see `WeightFormat.takes` for its shape. Codes are from 0 to 15, zeros not
            negative, and the lowest 8 bits of scales are 0.
        bias: [outputs].
        library: the implementation.
        level: the instructions to use, one of the library's levels.
    """

    def __init__(self, weight: LinearWeights, bias: Tensor | None, library: QuantizedLibrary, level: str) -> None:
        group, words = _group_of(weight), _words_of(weight)
        outputs, inputs = weight.codes.shape
        codes = weight.codes.contiguous()
        packed = torch.empty(weight.format.weight_bytes((outputs, inputs)), dtype=torch.uint8)
        added = None if bias is None else F.pad(bias.float(), (0, padded_outputs(outputs) - outputs))
        address = None if added is None else added.data_ptr()
        layer = _Layer(packed.data_ptr(), address, inputs, outputs, group, level_number(level))
        pointer = ctypes.addressof(layer)
        library.int4_pack(pointer, codes.data_ptr(), words.data_ptr(), packed.data_ptr(), threads())
        super().__init__(
            library.int4_linear, library.int4_top, layer, outputs, weight.format.row_bytes(inputs), (packed, added)
        )


class TorchInt4Linear:
    """The PyTorch implementation, for any shape. See `NativeInt4Linear` for the arguments.

    It keeps two codes in a byte too, so that it needs no more memory than is planned.
    """

    def __init__(self, weight: LinearWeights, bias: Tensor | None) -> None:
        self._group = _group_of(weight)
        self._outputs, self._inputs = weight.codes.shape
        codes = F.pad(weight.codes, (0, self._inputs % 2))
        self._packed = codes[:, ::2] | codes[:, 1::2] << 4
        self._words = _words_of(weight)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return in_parts(x, self._outputs, self._multiply)

    def _multiply(self, x: Tensor) -> Tensor:
        out = torch.zeros((len(x), self._outputs))
        for number, first in enumerate(range(0, self._inputs, self._group)):
            codes, row_scales = quantize_rows(self._padded(x[:, first : first + self._group]))
            weight, scales = self._group_weight(number)
            out.add_(torch._int_mm(codes, weight.t()).float().mul_(scales).mul_(row_scales))
        return out if self._bias is None else out.add_(self._bias)

    def _group_weight(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the codes of a group less their zeros, int8 [outputs, group], and the scales, [outputs]."""
        packed = self._packed[:, number * self._group // 2 :][:, : self._group // 2]
        codes = torch.stack((packed & 15, packed >> 4 & 15), dim=2).flatten(1)
        words = self._words[:, number]
        zeros = (words & _ZERO_BITS).to(torch.int8)
        return self._padded(codes - zeros.unsqueeze(1)), (words & ~_ZERO_BITS).view(torch.float32)

    def _padded(self, part: Tensor) -> Tensor:
        """Return the numbers of a group, with zeros up to its full size.

        PyTorch's product of a single input is wrong.
        """
        return F.pad(part, (0, self._group - part.shape[1]))


def _group_of(weight: LinearWeights) -> int:
    """Return the group of a weight in 4 bits.

    Raises:
        ValueError: there is no kernel for its format.
    """
    group = weight.format.group
    if group is None or group % 16 or group > _LARGEST_GROUP or weight.zeros is None:
        raise ValueError(f"no kernel for weights in {weight.format}, zeros: {weight.zeros is not None}")
    return group


def _words_of(weight: LinearWeights) -> Tensor:
    """Return scales and zeros in one number for each group: int32 [outputs, groups].

    Raises:
        ValueError: a scale has more than 16 significant bits.
    """
    assert weight.zeros is not None
    bits = weight.scales.contiguous().view(torch.int32)
    if (bits & _ZERO_BITS).any():
        raise ValueError(f"scales of weights in {weight.format} may have 16 significant bits")
    return bits | weight.zeros.int()
