"""Weights in fewer bits: made from others, and multiplied. The one place that knows all formats."""

from torch import Tensor

from shoal.kernels.int4_linear import NativeInt4Linear, TorchInt4Linear
from shoal.kernels.int4_weights import quantize_int4
from shoal.kernels.int8_linear import NativeInt8Linear, TorchInt8Linear
from shoal.kernels.linear_weights import LinearWeights, quantize_int8
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.weight_format import INT8, WeightFormat

QuantizedLinear = NativeInt4Linear | TorchInt4Linear | NativeInt8Linear | TorchInt8Linear


def quantize_weight(weight: Tensor, kept_in: WeightFormat) -> LinearWeights:
    """Return a weight, [outputs, inputs], in a format. It is on the CPU."""
    return quantize_int4(weight, kept_in) if kept_in.bits == 4 else quantize_int8(weight)


def make_quantized_linear(weight: LinearWeights, bias: Tensor | None) -> QuantizedLinear:
    """Return a linear layer with this weight. The caller should drop the weight, of which there may be two copies.

    Raises:
        ValueError: there is no kernel for its format.
    """
    library, _ = load_quantized()
    if weight.format.bits == 4:
        if library is None:
            return TorchInt4Linear(weight, bias)
        return NativeInt4Linear(weight, bias, library, library.levels[-1])
    if weight.format is not INT8 or weight.scales.shape[1] != 1 or weight.zeros is not None:
        raise ValueError(f"no kernel for weights in {weight.format} with scales of shape {list(weight.scales.shape)}")
    if library is None:
        return TorchInt8Linear(weight, bias)
    return NativeInt8Linear(weight, bias, library, library.levels[-1])
