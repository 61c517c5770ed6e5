"""The keys of random numbers, which make draws reproducible.

The random number for a token depends only on the seed, the sample index, the position and the token id. So a request
draws the same tokens in every batch, layout and replay, and a rank with a part of the vocabulary can compute exactly
its part. Each row has a 64-bit key, computed by a chain of splitmix64 finalizers (Steele et al., OOPSLA 2014);
`kernels.gumbel_noise` turns a key and a token id into noise.
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
    """Return the key of each row: [m]. The arguments are [m] too; the position is that of the token to be drawn."""
    with np.errstate(over="ignore"):
        key = _splitmix64(seed + _GOLDEN)
        key = _splitmix64((key ^ sample_index) + _GOLDEN)
        return _splitmix64((key ^ position) + _GOLDEN)


def split_keys(keys: U64) -> Tensor:
    """Return keys [m] as int32 [m, 2], the form that sampling kernels take."""
    return torch.from_numpy(keys.view(np.int32).reshape(-1, 2).copy())
