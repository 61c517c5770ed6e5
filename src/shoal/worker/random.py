"""The keys of random numbers: what a draw is for decides what is drawn.

A draw is keyed by (seed, sample index, position, token id), so the same request draws the same in any batch, layout
or replay, and a rank that holds a part of the vocabulary computes exactly its part. Rows get a 64-bit key from a
chain of splitmix64 finalizers (Steele et al., OOPSLA 2014); `kernels.noise` makes a token's noise of it.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

U64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: U64) -> U64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_keys(seed: U64, sample_index: U64, position: U64) -> U64:
    """The key of each row: [m] each, the position being that of the token to come."""
    with np.errstate(over="ignore"):
        key = _splitmix64(seed + _GOLDEN)
        key = _splitmix64((key ^ sample_index) + _GOLDEN)
        return _splitmix64((key ^ position) + _GOLDEN)


def split_keys(keys: U64) -> Tensor:
    """[m] -> int32 [m, 2], the form in which a device takes them."""
    return torch.from_numpy(keys.view(np.int32).reshape(-1, 2).copy())
