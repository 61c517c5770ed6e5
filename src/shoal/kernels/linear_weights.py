"""The weight of a linear layer in fewer bits, as readers of checkpoints give it to the kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.weight_format import INT8, WeightFormat

LARGEST_CODE = 127  # -128 is not used, so that the codes of a number and its negative are negatives too
_SMALLEST = 2.0**-100  # a row whose numbers are smaller has codes of 0
_NUMBERS_AT_A_TIME = 1 << 20  # that are converted to float32 together


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """A rank's weight of a linear layer, [outputs, inputs], in a format of fewer bits.

    Number (o, i) is (codes[o, i] - zeros[o, g]) * scales[o, g], where g is the group of the input i. Groups are counted
    from the first input that the rank has; the last one may be smaller than the others.
    """

    format: WeightFormat
    codes: Tensor  # int8 [outputs, inputs]; from 0 to 15 if the format has 4 bits
    scales: Tensor  # float32 [outputs, groups]
    zeros: Tensor | None = None  # int8 [outputs, groups]; None: all are 0

    def dequantized(self) -> Tensor:
        """Return the numbers, float32 [outputs, inputs]."""
        inputs = self.codes.shape[1]
        group_of = torch.arange(inputs) // (self.format.group or inputs)
        codes = self.codes.float()
        if self.zeros is not None:
            codes -= self.zeros.float()[:, group_of]
        return codes * self.scales[:, group_of]


def quantize_int8(weight: Tensor) -> LinearWeights:
    """Return a weight, [outputs, inputs], as int8: the largest number of each output becomes 127 or -127.

    It is converted part by part, so that no copy in float32 exists.
    """
    outputs, inputs = weight.shape
    codes = torch.empty((outputs, inputs), dtype=torch.int8)
    scales = torch.empty((outputs, 1))
    rows = max(_NUMBERS_AT_A_TIME // max(inputs, 1), 1)
    for start in range(0, outputs, rows):
        part = slice(start, start + rows)
        codes[part], scales[part] = quantize_rows(weight[part])
    return LinearWeights(INT8, codes, scales)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 codes of a matrix, of its shape, and the scale of each row, float32 [rows, 1].

    A row with an infinite or undefined number has the scale NaN.
    """
    wide = x.float()
    top = wide.abs().amax(1, keepdim=True)
    top = torch.where(top.isfinite(), top.clamp(min=_SMALLEST), torch.nan)
    largest = torch.tensor(float(LARGEST_CODE))
    inverse = largest.div(top)  # `127 / top` would multiply by a reciprocal, which rounds twice
    return wide.mul(inverse).round_().nan_to_num_(0).to(torch.int8), top / largest
