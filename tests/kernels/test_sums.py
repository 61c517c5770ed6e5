"""Sums and multiples of rows: the native kernels have the bits of PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import NATIVE, TYPES, needs_native, threads
from shoal.kernels.native import NativeKernels
from support.example_counts import examples

pytestmark = needs_native

shapes = st.tuples(st.integers(0, 5), st.integers(1, 130))
factors = st.floats(width=32, allow_nan=False)
seeds, types = st.integers(0, 2**31), st.sampled_from(TYPES)
MANY = (70, 1000)  # enough for several threads


def native() -> NativeKernels:
    assert NATIVE is not None
    return NATIVE


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return numbers of all sizes, some of them infinite or NaN."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator) * 10 ** torch.randint(-39, 39, shape, generator=generator).double()
    rare = torch.rand(shape, generator=generator) < 0.05
    return found.masked_fill(rare, torch.inf if seed % 2 else torch.nan).to(dtype)


def same(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@given(shape=shapes, dtype=types, seed=seeds)
@settings(max_examples=examples(60), deadline=None)
def test_add(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> None:
    x = numbers(shape, dtype, seed)
    for y in (numbers(shape, dtype, seed + 1), numbers(shape[1:], dtype, seed + 1)):
        same(native().add(x.clone(), y), x + y)


@given(shape=shapes, dtype=types, factor=factors, seed=seeds)
@settings(max_examples=examples(60), deadline=None)
def test_scale(shape: tuple[int, int], dtype: torch.dtype, factor: float, seed: int) -> None:
    x = numbers(shape, dtype, seed)
    same(native().scale(x.clone(), factor), x * factor)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    x, y = numbers(MANY, dtype, 1), numbers(MANY, dtype, 2)
    with threads(3):
        same(native().add(x.clone(), y), x + y)
        same(native().scale(x.clone(), 0.3), x * 0.3)


@pytest.mark.parametrize("y", [torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4), torch.ones(1, 3)], ids=str)
def test_other_types_and_shapes_are_refused(y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"cannot be added to \[2, 3\] in torch.float32"):
        native().add(torch.ones(2, 3), y)
