"""Both implementations, and how far a result may be from its formula."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from shoal.kernels.native import load_native
from shoal.kernels.reference import ReferenceKernels

NATIVE, WHY = load_native()
REFERENCE = ReferenceKernels()
needs_native = pytest.mark.skipif(NATIVE is None, reason=WHY)
BOTH = [pytest.param(NATIVE, id="native", marks=needs_native), pytest.param(REFERENCE, id="reference")]
TYPES = [torch.float32, torch.bfloat16]
# Native computes float16 nowhere.
BOTH_AND_TYPES = [pytest.param(*each.values, dtype, marks=each.marks) for each in BOTH for dtype in TYPES] + [
    pytest.param(REFERENCE, torch.float16)
]


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return float(torch.finfo(dtype).eps) / 2


def half_subnormal(dtype: torch.dtype) -> float:
    """The largest error of rounding a number below the smallest normal one."""
    return float(torch.finfo(dtype).smallest_normal) * unit(dtype)


def close(out: Tensor, wanted: Tensor, roundings: int, size: Tensor | None = None) -> None:
    """Each rounding to the dtype may add its unit of the result, and float32 arithmetic in between four of its own
    units of `size`, which is what was added up to give the result (by default itself)."""
    assert out.shape == wanted.shape
    error = (out.double() - wanted).abs()
    size = wanted.abs() if size is None else size
    bound = wanted.abs() * roundings * 1.01 * unit(out.dtype) + size * 4 * unit(torch.float32)
    assert (error <= bound + roundings * half_subnormal(out.dtype) + half_subnormal(torch.float32)).all()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
