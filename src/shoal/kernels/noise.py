"""The noise behind every draw, as a function of a row's key and the token id.

A token's bits are the key's halves and the token id through two rounds of a 32-bit finalizer (the constants of
lowbias32, by C. Wellons' search). `csrc/sampling.cpp` computes the same bits.
"""

import torch
from torch import Tensor

# Smallest gap to 1 that float32 shows: keeps the logarithms finite.
_LARGEST_BELOW_ONE = 1 - 2**-24


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise of each (row, token): keys int32 [m, 2], ids int32 [v] or [m, v]. float32 [m, v]."""
    x = _mix(ids ^ keys[:, :1])
    x = _mix(x ^ keys[:, 1:])
    v = ((x & 0x7FFFFFFF).float() + 0.5) * 2.0**-31
    return -torch.log(-torch.log1p(-v.clamp_(max=_LARGEST_BELOW_ONE)))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32 bits; int32 multiplies wrap, and masks make the shifts logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)
