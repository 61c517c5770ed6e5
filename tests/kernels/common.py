"""The two implementations of the kernels, and the largest error that a result may have."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from shoal.kernels.native import NativeKernels, load_native, load_native_library
from shoal.kernels.reference import ReferenceKernels

NATIVE, WHY = load_native()
REFERENCE = ReferenceKernels()
needs_native = pytest.mark.skipif(NATIVE is None, reason=WHY)
BOTH = [pytest.param(NATIVE, id="native", marks=needs_native), pytest.param(REFERENCE, id="reference")]
_LIBRARY, _ = load_native_library()
# Attention with all instructions of this machine, and with those of others.
ATTENTION = [] if _LIBRARY is None else [NativeKernels(_LIBRARY, level) for level in ("best", "avx2", "portable")]
TYPES = [torch.float32, torch.bfloat16]
# The native kernels do not compute in float16.
BOTH_AND_TYPES = [pytest.param(*each.values, dtype, marks=each.marks) for each in BOTH for dtype in TYPES] + [
    pytest.param(REFERENCE, torch.float16)
]


def unit(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding."""
    return float(torch.finfo(dtype).eps) / 2


def half_subnormal(dtype: torch.dtype) -> float:
    """Return the largest error of rounding a subnormal number."""
    return float(torch.finfo(dtype).smallest_normal) * unit(dtype)


def close(out: Tensor, wanted: Tensor, roundings: int, size: Tensor | None = None) -> None:
    """Assert that the error is at most one unit of the result per rounding, and four float32 units of `size`.

    size: the sum of the absolute values of the terms of the result; by default the result's own absolute value.
    """
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
