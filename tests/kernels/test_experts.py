"""Tests of grouped experts: they give the weighted sum over each row's experts, with the same bits in any batch."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import BOTH_AND_TYPES, NATIVE, TYPES, WHY, close, threads
from shoal.kernels.base import Kernels
from shoal.kernels.experts import GroupedExperts
from shoal.kernels.linear import make_linear
from shoal.kernels.reference import ReferenceKernels
from support.fakes import steady

HIDDEN, INNER = 40, 24


class Experts:
    """Random experts, as `GroupedExperts` and as plain matrices."""

    def __init__(self, count: int, dtype: torch.dtype, kernels: Kernels) -> None:
        self.up = [(torch.randn(2 * INNER, HIDDEN) * 0.2).to(dtype) for _ in range(count)]
        self.down = [(torch.randn(HIDDEN, INNER) * 0.2).to(dtype) for _ in range(count)]
        self.grouped = GroupedExperts(
            [make_linear(up, None) for up in self.up],
            partial(kernels.activate_gated, activation="silu"),
            [make_linear(down, None) for down in self.down],
            kernels,
        )

    def one_by_one(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Compute the experts of each row one by one in float64."""
        out = torch.zeros_like(x, dtype=torch.float64)
        for i, row in enumerate(x.double()):
            for expert, weight in zip(experts[i].tolist(), weights[i].double(), strict=True):
                if expert >= 0:
                    gate, up = (self.up[expert].double() @ row).chunk(2)
                    out[i] += weight * (self.down[expert].double() @ (F.silu(gate) * up))
        return out


def chosen(rows: int, k: int, count: int) -> tuple[Tensor, Tensor]:
    experts = torch.stack([torch.randperm(count)[:k] for _ in range(rows)]) if rows else torch.empty(0, k).long()
    return experts, torch.rand(rows, k)


@pytest.mark.slow
@settings(steady, max_examples=40)
@given(
    rows=st.integers(0, 20), count=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 2**31), data=st.data()
)
def test_the_sum_over_experts(rows: int, count: int, share: float, seed: int, data: st.DataObject) -> None:
    """Any part of the experts may be on other ranks, even all of them."""
    torch.manual_seed(seed)
    made = Experts(count, torch.float32, ReferenceKernels())
    experts, weights = chosen(rows, data.draw(st.integers(1, count)), count)
    experts = experts.masked_fill(torch.rand(experts.shape) < share, -1)
    x = torch.randn(rows, HIDDEN)
    out = made.grouped(x, experts, weights)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert torch.allclose(out.double(), made.one_by_one(x, experts, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
def test_types(kernels: Kernels, dtype: torch.dtype) -> None:
    made = Experts(6, dtype, kernels)
    experts, weights = chosen(9, 3, 6)
    x = torch.randn(9, HIDDEN).to(dtype)
    out, wanted = made.grouped(x, experts, weights), made.one_by_one(x, experts, weights)
    assert out.dtype == dtype
    assert float((out.double() - wanted).abs().max()) < 40 * float(torch.finfo(dtype).eps) * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_does_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    if NATIVE is None:
        pytest.skip(WHY)
    made = Experts(8, dtype, NATIVE)
    experts, weights = chosen(33, 3, 8)
    x = torch.randn(33, HIDDEN).to(dtype)
    whole = made.grouped(x, experts, weights)
    for rows in (slice(0, 1), slice(5, 7), slice(32, 33), slice(3, 30)):
        assert torch.equal(made.grouped(x[rows], experts[rows], weights[rows]), whole[rows])
    order = torch.randperm(33)
    assert torch.equal(made.grouped(x[order], experts[order], weights[order]), whole[order])
    elsewhere = experts.clone()
    elsewhere[:20] = -1
    assert torch.equal(made.grouped(x, elsewhere, weights)[20:], whole[20:])
    with threads(3):
        assert torch.equal(made.grouped(x, experts, weights), whole)


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
@pytest.mark.parametrize("shape", [(5, 33), (1, 64), (0, 40), (70, 1000)])
def test_weighted_sum(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape).to(dtype)
    indices = torch.randint(-1, shape[0], (9, 4))
    weights = torch.randn(9, 4)
    out = kernels.weighted_sum(x, indices, weights)
    terms = torch.zeros(9, 4, shape[1], dtype=torch.float64)
    for i in range(9):
        for j in range(4):
            if indices[i, j] >= 0:
                terms[i, j] = x[indices[i, j]].double() * weights[i, j].double()
    assert out.dtype == dtype
    close(out, terms.sum(1), 1, terms.abs().sum(1))
    with threads(3):
        assert torch.equal(kernels.weighted_sum(x, indices, weights), out)
    assert kernels.weighted_sum(x, indices[:0], weights[:0]).shape == (0, shape[1])


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
def test_a_negative_index_adds_nothing(kernels: Kernels, dtype: torch.dtype) -> None:
    """It adds nothing even if a weight or a row is infinite or NaN."""
    x = torch.full((2, 20), torch.inf).to(dtype)
    out = kernels.weighted_sum(x, torch.tensor([[-1, -1]]), torch.tensor([[torch.nan, 1.0]]))
    assert torch.equal(out, torch.zeros(1, 20, dtype=dtype))
