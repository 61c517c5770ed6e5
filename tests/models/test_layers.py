"""Each layout of a layer computes the formula that models/spec.py gives for it, with any attention and MLP."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from shoal.comm.local import LocalComm
from shoal.kernels.base import Norm
from shoal.kernels.linear import PlainLinear
from shoal.kernels.reference import ReferenceKernels
from shoal.models.layers.decoder_layer import Layer, Norms, NormSumLayer, ParallelLayer, SerialLayer
from shoal.models.layers.embedding import Embedding, LearnedPositions
from shoal.parallel.embedding import VocabParallelEmbedding
from shoal.parallel.linear import RowParallelLinear
from shoal.parallel.mesh import Axis

HIDDEN = 12
KERNELS = ReferenceKernels()
ALONE = Axis("tp", 0, 1, LocalComm())
GENERATOR = torch.Generator().manual_seed(0)
BATCH, CACHE = cast(Any, None), cast(Any, None)  # the fake sublayers do not use them


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


class Sublayer:
    """A fake attention or MLP, which computes out(tanh(x * inner))."""

    def __init__(self) -> None:
        self.inner = random(HIDDEN)
        self.out = self.down = RowParallelLinear(
            PlainLinear(random(HIDDEN, HIDDEN), None), random(HIDDEN), ALONE, KERNELS
        )

    def attend(self, x: Tensor, *_: object) -> Tensor:
        return torch.tanh(x * self.inner)

    expand = attend

    def __call__(self, x: Tensor, *_: object) -> Tensor:
        return self.out(self.attend(x))


A, M = Sublayer(), Sublayer()
ATTENTION, MLP = cast(Any, A), cast(Any, M)
N1, N2, N3, N4 = (Norm("layer", random(HIDDEN), random(HIDDEN), 1e-5) for _ in range(4))


def n(norm: Norm, x: Tensor) -> Tensor:
    return KERNELS.norm(x, norm)


def norms(before: Norm | None, after: Norm | None) -> Norms:
    return Norms(before, after, KERNELS)


def pre(x: Tensor) -> Tensor:
    x = x + A(n(N1, x))
    return x + M(n(N2, x))


def post(x: Tensor) -> Tensor:
    x = x + n(N1, A(x))
    return x + n(N2, M(x))


def sandwich(x: Tensor) -> Tensor:
    x = x + n(N2, A(n(N1, x)))
    return x + n(N4, M(n(N3, x)))


def parallel(x: Tensor) -> Tensor:
    return x + A(n(N1, x)) + M(n(N2, x))


def parallel_one(x: Tensor) -> Tensor:
    return x + A(n(N1, x)) + M(n(N1, x))


def norm_sum(x: Tensor) -> Tensor:
    x = n(N1, x + A(x))
    return n(N2, x + M(x))


@pytest.mark.parametrize(
    ("formula", "layer"),
    [
        (pre, SerialLayer(norms(N1, None), ATTENTION, norms(N2, None), MLP)),
        (post, SerialLayer(norms(None, N1), ATTENTION, norms(None, N2), MLP)),
        (sandwich, SerialLayer(norms(N1, N2), ATTENTION, norms(N3, N4), MLP)),
        (parallel, ParallelLayer(N1, ATTENTION, N2, MLP, KERNELS)),
        (parallel_one, ParallelLayer(N1, ATTENTION, None, MLP, KERNELS)),
        (norm_sum, NormSumLayer(ATTENTION, N1, MLP, N2, KERNELS)),
    ],
)
def test_a_layer_computes_the_formula_of_its_layout(formula: Any, layer: Layer) -> None:
    x, residual = random(5, HIDDEN), random(5, HIDDEN)
    wanted = formula(x + residual)
    for _ in range(2):  # the results of a layer are the arguments of the next one
        x, residual = layer(x, residual, BATCH, CACHE)
        # The tolerance allows for another order of summation in float32.
        torch.testing.assert_close(x + residual, wanted, atol=2e-5, rtol=0)
        wanted = formula(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_scales_projects_and_adds_positions(dtype: torch.dtype) -> None:
    """The scale is rounded to the type of the weights, as in transformers."""
    weight, table = random(7, HIDDEN).to(dtype), random(9, HIDDEN).to(dtype)
    tokens, positions = torch.tensor([3, 0, 6]), torch.tensor([0, 1, 5])
    rows = VocabParallelEmbedding(weight, range(7), ALONE)
    scale = 5.123456
    scaled = Embedding(rows, scale, None, None)(tokens, positions)
    assert torch.equal(scaled, weight[tokens] * torch.tensor(scale).to(dtype))
    placed = Embedding(rows, None, None, LearnedPositions(table, 2))(tokens, positions)
    assert torch.equal(placed, weight[tokens] + table[[2, 3, 7]])
    projection = random(5, HIDDEN).to(dtype)
    projected = Embedding(rows, None, PlainLinear(projection, None), None)(tokens, positions)
    assert torch.equal(projected, torch.nn.functional.linear(weight[tokens], projection))
