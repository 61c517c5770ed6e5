"""Making weights of 4 bits from any others.

There are two implementations with the same bits: C++ (`csrc/int4_quantize.cpp`, which describes the search for scales)
and PyTorch, which takes ten times as long.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.linear_weights import LinearWeights
from shoal.kernels.quantized_library import TYPE_CODES, QuantizedLibrary, load_quantized, threads
from shoal.kernels.weight_format import WeightFormat

_NUMBERS_AT_A_TIME = 1 << 20  # that are converted to float32 together
_MOST_CODE = 15.0
_SMALLEST = 2.0**-100  # a group whose numbers are smaller has codes of 0
_WIDTHS = (
    15,
    14,
    13,
    12,
    16,
    17,
    18,
    20,
)  # scales that are tried, as codes between the smallest and the largest number


def quantize_int4(weight: Tensor, kept_in: WeightFormat) -> LinearWeights:
    """Return a weight, [outputs, inputs], in a format with 4 bits and groups.

    It is converted part by part, so that no copy in float32 exists. An output has its groups from its first input on.
    """
    library, _ = load_quantized()
    return torch_int4(weight, kept_in) if library is None else native_int4(weight, kept_in, library)


def native_int4(weight: Tensor, kept_in: WeightFormat, library: QuantizedLibrary) -> LinearWeights:
    """Do so in C++."""
    found = _empty(weight, kept_in)
    assert found.zeros is not None
    for part in _parts(weight) if weight.dtype not in TYPE_CODES else (slice(None),):
        numbers = (weight[part] if weight.dtype in TYPE_CODES else weight[part].float()).contiguous()
        library.int4_quantize(
            *(TYPE_CODES[numbers.dtype], numbers.data_ptr(), *numbers.shape, kept_in.group),
            *(found.codes[part].data_ptr(), found.scales[part].data_ptr(), found.zeros[part].data_ptr(), threads()),
        )
    return found


def torch_int4(weight: Tensor, kept_in: WeightFormat) -> LinearWeights:
    """Do so in PyTorch."""
    found = _empty(weight, kept_in)
    assert found.zeros is not None
    assert kept_in.group is not None
    for part in _parts(weight):
        rows, inputs = weight[part].shape
        padded = F.pad(weight[part].float(), (0, -inputs % kept_in.group)).view(-1, kept_in.group)
        codes, scales, zeros = _quantize_groups(padded.t().contiguous())
        found.codes[part] = codes.t().reshape(rows, -1)[:, :inputs]
        found.scales[part] = scales.view(rows, -1)
        found.zeros[part] = zeros.view(rows, -1)
    return found


def _empty(weight: Tensor, kept_in: WeightFormat) -> LinearWeights:
    outputs, inputs = weight.shape
    groups = (outputs, kept_in.groups(inputs))
    codes = torch.empty((outputs, inputs), dtype=torch.int8)
    return LinearWeights(kept_in, codes, torch.empty(groups), torch.empty(groups, dtype=torch.int8))


def _parts(weight: Tensor) -> list[slice]:
    rows = max(_NUMBERS_AT_A_TIME // max(weight.shape[1], 1), 1)
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


def _quantize_groups(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and zeros of groups, one in each column of `numbers`, [group, count]."""
    finite = numbers.isfinite().all(0)
    low, high = numbers.amin(0).clamp(max=0), numbers.amax(0).clamp(min=0)
    unit = torch.where(finite, _divided(high, _MOST_CODE) - _divided(low, _MOST_CODE), 1.0).clamp(min=_SMALLEST)
    per_unit = unit.reciprocal()
    v = torch.where(finite, numbers * per_unit, 0.0)
    lowest = torch.where(finite, -(-low * per_unit).round(), 0.0)
    best, scale = torch.full_like(unit, -1.0), torch.zeros_like(unit)
    for width in _WIDTHS:
        vc, cc = _sums(v, _codes(v, torch.full_like(unit, width / _MOST_CODE), lowest))
        gain = torch.where(cc > 0, vc * vc / cc, 0.0)
        scale = torch.where(gain > best, _scale(vc, cc), scale)
        best = torch.maximum(gain, best)
    scale = _scale(*_sums(v, _codes(v, scale.reciprocal(), lowest))) * unit
    kept = (scale.view(torch.int32) + 0x80 & ~0xFF).view(torch.float32)
    codes = (_codes(v, unit / kept, lowest) - lowest).to(torch.int8)
    return codes, torch.where(finite, kept, torch.nan), (-lowest).to(torch.int8)


def _divided(x: Tensor, by: float) -> Tensor:
    return x / torch.tensor(by)  # by a number of Python's it would be multiplied by a reciprocal, which rounds twice


def _codes(v: Tensor, inverse: Tensor, lowest: Tensor) -> Tensor:
    """Return the codes less the zeros."""
    return torch.minimum((v * inverse).round_().maximum(lowest), lowest + _MOST_CODE)


def _sums(v: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over the rows of v times codes, and of codes times codes, added in the order of the rows."""
    vc, cc = torch.zeros_like(v[0]), torch.zeros_like(v[0])
    for product, square in zip(v * codes, codes * codes, strict=True):
        vc += product
        cc += square
    return vc, cc


def _scale(vc: Tensor, cc: Tensor) -> Tensor:
    return torch.where(cc > 0, vc / cc, 1.0)
