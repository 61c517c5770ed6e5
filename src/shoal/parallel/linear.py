"""Linear layers that are split over a tensor-parallel axis (Megatron-LM, Shoeybi et al., 2019)."""

from torch import Tensor

from shoal.kernels.linear import Linear
from shoal.kernels.native_calls import compute, exchange
from shoal.parallel.mesh import Axis


def _sum_over(tp: Axis, x: Tensor) -> Tensor:
    return tp.comm.all_reduce(x) if tp.size == 1 else exchange(tp.comm.all_reduce, x)


class RowParallelLinear:
    """A linear layer whose input features are split over ranks; the partial results are summed over the axis.

    The bias is added after the all-reduce, once: every rank adds the same bias to the same sum.
    """

    def __init__(self, inner: Linear, bias: Tensor | None, tp: Axis) -> None:
        self.inner = inner
        self.bias = bias
        self.tp = tp

    def __call__(self, x: Tensor) -> Tensor:
        out, bias = _sum_over(self.tp, self.inner(x)), self.bias
        return out if bias is None else compute(lambda sums: sums + bias, out, out.shape)


class RowParallelSum:
    """The sum of two row-parallel layers, each with an input of its own, with one all-reduce for both."""

    def __init__(self, first: RowParallelLinear, second: RowParallelLinear) -> None:
        self.first = first
        self.second = second
        biases = [layer.bias for layer in (first, second) if layer.bias is not None]
        self.bias = sum(biases[1:], start=biases[0]) if biases else None

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        out = _sum_over(self.first.tp, self.first.inner(a) + self.second.inner(b))
        return out if self.bias is None else out + self.bias
