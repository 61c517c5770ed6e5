"""The release of unused memory to the system."""

import ctypes

import torch

from shoal.process import garbage_collector


def release_memory(device: torch.device) -> None:
    """Give all unused memory of this process back to the system.

    By themselves, glibc keeps free memory that lies below memory in use, and PyTorch keeps all memory of a GPU.
    """
    garbage_collector.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Give the free pages of the heap back to the system. This takes some milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
