"""The interface that moves tokens to the ranks that hold their experts, and back. Each backend is one file."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.kernels.native_calls import compute
from shoal.parallel.mesh import Axis


@dataclass(frozen=True, slots=True)
class Routed:
    """The tokens that reach one rank's experts.

    x: [m, hidden]. experts: int64 [m, k], numbers of this rank's experts from 0 on, or -1 for an expert of another
    rank. weights: float32 [m, k].
    """

    x: Tensor
    experts: Tensor
    weights: Tensor


class Dispatch(Protocol):
    """Moves tokens to their experts and the results back.

    Every rank of the group calls the same methods in the same order, even if it has no tokens.
    """

    keeps_tokens: bool  # no token leaves its rank: `dispatch` exchanges nothing

    def begin_step(self, tokens: int) -> None:
        """Tell the group how many tokens this replica computes in this step. Called before the first layer."""

    def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Routed:
        """Return the tokens that reach this rank, with their experts here; a token may have none here.

        x: [n, hidden], the replica's tokens, equal on its tensor-parallel ranks. experts: int64 [n, k], numbers of the
        model's experts; weights: float32 [n, k].
        """

    def combine(self, out: Tensor, partial: Tensor | None) -> Tensor:
        """Return the sum of the results of each token's experts: [n, hidden], equal on each tensor-parallel rank.

        out: [m, hidden], for each row that the last `dispatch` has returned the weighted sum of the results of this
        rank's experts. partial: [n, hidden], this rank's term of another sum over the tensor-parallel ranks, which is
        added to the result.
        """


class TensorParallelDispatch:
    """Dispatch within one replica, whose tensor-parallel ranks all have all tokens.

    No token is sent; the results are summed over the tensor-parallel ranks. Either each rank has a part of every
    expert, or each expert is whole on one rank.
    """

    keeps_tokens = True

    def __init__(self, tp: Axis, expert_map: Tensor | None = None) -> None:
        """expert_map: see `make_expert_map`; None if this rank has a part of every expert."""
        self.tp = tp
        self.expert_map = expert_map

    def begin_step(self, tokens: int) -> None:
        pass

    def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Routed:
        return Routed(x, experts if self.expert_map is None else self.expert_map[experts], weights)

    def combine(self, out: Tensor, partial: Tensor | None) -> Tensor:
        return self.tp.sum(out if partial is None else compute(torch.add, out, out.shape, partial))
