"""The choice of the kernels' implementation for a device and a dtype."""

import torch

from shoal.kernels.base import Kernels
from shoal.kernels.native import load_native
from shoal.kernels.reference import ReferenceKernels


def make_kernels(device: str, dtype: torch.dtype) -> tuple[Kernels, str]:
    """Return the kernels, and one line for the log that says why these were chosen."""
    if torch.device(device).type != "cpu":
        return ReferenceKernels(), f"reference kernels: the native kernels are for the CPU, not {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return ReferenceKernels(), f"reference kernels: the native kernels do not compute in {dtype}"
    native, reason = load_native()
    if native is None:
        return ReferenceKernels(), f"reference kernels: {reason}"
    return native, reason
