"""Linear layers that are split over a tensor-parallel axis (Megatron-LM, Shoeybi et al., 2019)."""

from collections.abc import Callable

from torch import Tensor

from shoal.kernels.base import Kernels
from shoal.kernels.linear import Linear
from shoal.parallel.mesh import Axis


class RowParallelLinear:
    """A linear layer whose input features are split over ranks; the partial results are summed over the axis.

    The bias is added after the all-reduce, once: every rank adds the same bias to the same sum.
    """

    def __init__(self, inner: Linear, bias: Tensor | None, tp: Axis, kernels: Kernels) -> None:
        self.inner = inner
        self.bias = bias
        self.tp = tp
        self.kernels = kernels

    def __call__(self, x: Tensor) -> Tensor:
        return self._with_bias(self.tp.sum_of(x, self.inner))

    def after(self, first: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return the layer's output for first(x), where `first` gives each row of x a row that no other changes."""
        return self._with_bias(self.tp.sum_of(x, lambda part: self.inner(first(part))))

    def _with_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else self.kernels.add(out, self.bias)


class RowParallelSum:
    """The sum of two row-parallel layers, each with an input of its own, with one all-reduce for both."""

    def __init__(self, first: RowParallelLinear, second: RowParallelLinear) -> None:
        self.first = first
        self.second = second
        biases = [layer.bias for layer in (first, second) if layer.bias is not None]
        self.bias = sum(biases[1:], start=biases[0]) if biases else None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        kernels = self.first.kernels
        out = self.first.tp.sum(kernels.add(self.first.inner(a), self.second.inner(b)))
        return out if self.bias is None else kernels.add(out, self.bias)
