"""The Gumbel noise of every draw, as a function of a row's key and the token id.

The random bits of a token come from two rounds of a 32-bit hash finalizer over the token id and the two halves of the
key (with the constants of C. Wellons' lowbias32). `csrc/sampling.cpp` computes the same bits.
"""

import torch
from torch import Tensor

# The largest float32 below 1: it keeps the logarithms finite.
_LARGEST_BELOW_ONE = 1 - 2**-24


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise for each row and token: float32 [m, v].

    keys: int32 [m, 2]. ids: int32 [v] or [m, v].
    """
    x = _mix(ids ^ keys[:, :1])
    x = _mix(x ^ keys[:, 1:])
    v = ((x & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-v.clamp_(max=_LARGEST_BELOW_ONE)))


def _mix(x: Tensor) -> Tensor:
    """Hash 32 bits, one to one. int32 products wrap around, and the masks make the shifts logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)
