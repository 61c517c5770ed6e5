"""Memory that nothing refers to any more goes back to the system at once."""

import ctypes

import torch

from shoal.process import garbage_collector


def give_back(device: torch.device) -> None:
    """glibc keeps what lies below something that is in use, and PyTorch all of a GPU's, unless they are told."""
    garbage_collector.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)
