"""Linear layers whose weights are laid out once for the machine that multiplies with them."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """x: [n, in_features], n may be 0. Gives [n, out_features]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class PlainLinear:
    """PyTorch's own product, on the weight as it is: [out_features, in_features]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """oneDNN's product on a copy of the weight in oneDNN's blocked layout; the weight passed in is not kept.

    A row's result has the same bits whatever the number of rows. For bfloat16 oneDNN sees to that; for float32 it takes
    another path for one row alone (a matrix-vector product), so that one row is computed as two.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._out_features = weight.shape[0]
        # The second argument is the batch size to tune for. Layouts for other sizes differ little in speed.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)
        self._bias = bias
        self._fewest_rows = 2 if weight.dtype == torch.float32 else 1

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty((0, self._out_features))
        if rows < self._fewest_rows:
            return self._multiply(x.expand(self._fewest_rows, -1).contiguous())[:rows]
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


def make_linear(weight: Tensor, bias: Tensor | None) -> PackedLinear | PlainLinear:
    """weight: [out_features, in_features], either of which may be 0; bias: [out_features].

    The caller should let go of the weight: where it has been packed it would be held twice.
    """
    return PackedLinear(weight, bias) if _can_pack(weight) else PlainLinear(weight, bias)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() == 0 or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class HeadLinear(Protocol):
    """A matrix for each head. x: [n, heads, in_features], n may be 0. Gives [n, heads, out_features]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class PlainHeadLinear:
    """PyTorch's batched product, on the weights as they are: [heads, out_features, in_features]."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def __call__(self, x: Tensor) -> Tensor:
        return torch.bmm(x.transpose(0, 1), self._weights.transpose(1, 2)).transpose(0, 1)


class PackedHeadLinear:
    """Each head's product by itself, packed like any other: so a row's bits don't depend on the number of rows."""

    def __init__(self, weights: Tensor) -> None:
        self._out_features = weights.shape[1]
        self._heads = [PackedLinear(weight, None) for weight in weights]

    def __call__(self, x: Tensor) -> Tensor:
        out = x.new_empty((x.shape[0], len(self._heads), self._out_features))
        for i, head in enumerate(self._heads):
            out[:, i] = head(x[:, i].contiguous())
        return out


def make_head_linear(weights: Tensor) -> PackedHeadLinear | PlainHeadLinear:
    """weights: [heads, out_features, in_features], any of which may be 0. As with `make_linear`, let go of them."""
    return PackedHeadLinear(weights) if _can_pack(weights) else PlainHeadLinear(weights)
