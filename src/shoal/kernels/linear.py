"""Linear layers. On a CPU their weights are packed once into the layout that is multiplied fastest.

In bfloat16 our own code multiplies them on CPUs with AVX2 or more, in float32 oneDNN.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.bf16_linear import NativeBf16Group, NativeBf16Linear, load_bf16
from shoal.kernels.linear_weights import LinearWeights
from shoal.kernels.native_calls import compute
from shoal.kernels.quantized import QuantizedLinear, make_quantized_linear

_SINGLE_ROW_INPUTS = 1024  # up to these oneDNN adds the bfloat16 products of a single row as it does for more rows


class Linear(Protocol):
    """A linear layer."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, in_features], n may be 0. Gives [n, out_features]."""


class PlainLinear:
    """A linear layer that PyTorch computes with an unpacked weight: [out_features, in_features]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return compute(self._multiply, x, (len(x), len(self._weight)))

    def _multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """A linear layer that oneDNN computes, with a copy of the weight in oneDNN's blocked layout.

    It keeps no reference to the weight that is passed in. A row's result has the same bits for any number of rows, as
    was measured with AVX2, AVX-512 and, in float32, AMX (`tests/kernels/test_linear.py`). oneDNN alone gives that for
    two rows or more: it adds the products of a single row in another order, as a matrix-vector product in float32, and
    past 1,024 inputs in bfloat16. There a single row is computed as two. In bfloat16 with AMX, sums of more than 1,024
    inputs depend on the number of rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._out_features = weight.shape[0]
        # The second argument is the batch size to tune for. Layouts for other sizes have nearly the same speed.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self._bias = bias
        self._min_rows = 2 if weight.dtype == torch.float32 or weight.shape[1] > _SINGLE_ROW_INPUTS else 1

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty((0, self._out_features))
        return compute(self._multiply, x, (rows, self._out_features))

    def _multiply(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows < self._min_rows:
            return self._multiply(x.expand(self._min_rows, -1).contiguous())[:rows]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


PackedLayer = PackedLinear | NativeBf16Linear


def make_linear(weight: Tensor | LinearWeights, bias: Tensor | None) -> PackedLayer | PlainLinear | QuantizedLinear:
    """Return the fastest linear layer for a weight, with a packed copy of it if the CPU and the type allow that.

    weight: [out_features, in_features], either of which may be 0; bias: [out_features]. The caller should drop the
    weight: if it was packed there are two copies of it.
    """
    if isinstance(weight, LinearWeights):
        return make_quantized_linear(weight, bias)
    pack = _packing_of(weight)
    return PlainLinear(weight, bias) if pack is None else pack(weight, bias)


def _packing_of(weight: Tensor) -> Callable[[Tensor, Tensor | None], PackedLayer] | None:
    """Return what makes a packed layer of a weight, or of each of several; None if nothing does."""
    if weight.device.type != "cpu" or weight.numel() == 0:
        return None
    if weight.dtype == torch.bfloat16:
        native, _ = load_bf16()
        if native is not None:
            return partial(NativeBf16Linear, library=native, level=native.levels[-1])
        return PackedLinear if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    return PackedLinear if weight.dtype == torch.float32 and torch.backends.mkldnn.is_available() else None


class GroupedLinear(Protocol):
    """Linear layers of one shape, each with rows of its own."""

    def __call__(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """x: [n, in_features], of which the first `counts[0]` rows are the first layer's. Gives [n, out_features]."""


class LoopedLinears:
    """Linear layers that are called one after the other."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._layers = layers

    def __call__(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        groups = zip(self._layers, x.split(list(counts)), counts, strict=True)
        parts = [layer(rows) for layer, rows, count in groups if count]
        return torch.cat(parts or [self._layers[0](x)])


def make_grouped_linear(layers: Sequence[Linear]) -> GroupedLinear:
    """Return the layers as a group: computed in one call if they are our own in bfloat16, else one by one."""
    native = [layer for layer in layers if isinstance(layer, NativeBf16Linear)]
    one_shape = len({(layer.inputs, layer.outputs) for layer in native}) == 1
    return NativeBf16Group(native) if len(native) == len(layers) and one_shape else LoopedLinears(layers)


class HeadLinear(Protocol):
    """A linear layer with a matrix of its own for each head."""

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, heads, in_features], n may be 0. Gives [n, heads, out_features]."""


class PlainHeadLinear:
    """A linear layer per head that PyTorch's batched product computes, with unpacked weights: [heads, out, in]."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), self._weights.transpose(1, 2)).transpose(0, 1)


class PackedHeadLinear:
    """A packed linear layer for each head, so that a row's bits do not depend on the number of rows."""

    def __init__(self, weights: Tensor, pack: Callable[[Tensor, Tensor | None], PackedLayer]) -> None:
        self._out_features = weights.shape[1]
        self._heads = [pack(weight, None) for weight in weights]

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty((x.shape[0], len(self._heads), self._out_features))
        for i, head in enumerate(self._heads):
            out[:, i] = head(x[:, i].contiguous())
        return out


def make_head_linear(weights: Tensor) -> PackedHeadLinear | PlainHeadLinear:
    """Do the same as `make_linear` for each head. weights: [heads, out_features, in_features], any may be 0."""
    pack = _packing_of(weights)
    return PlainHeadLinear(weights) if pack is None else PackedHeadLinear(weights, pack)
