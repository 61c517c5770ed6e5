"""Moving tokens to the ranks that hold their experts, and back. One interface; a backend is one file."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shoal.parallel.mesh import Axis


@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens as a rank's experts get them.

    x: [m, hidden]. experts: int64 [m, k], which of the rank's experts (numbered from 0), -1 where the expert is on
    another rank. weights: float32 [m, k].
    """

    x: Tensor
    experts: Tensor
    weights: Tensor


class Dispatch(Protocol):
    """Every rank of the group calls the same methods in the same order, also with no tokens at all."""

    def begin_step(self, tokens: int) -> None:
        """Before the first layer of a step: tells the group how many tokens this replica computes."""

    def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Routed:
        """x: [n, hidden], the replica's tokens, the same on each of its tensor-parallel ranks. experts: int64 [n, k],
        numbers of the model's experts; weights: float32 [n, k]."""

    def combine(self, routed: Routed, out: Tensor, partial: Tensor | None) -> Tensor:
        """What all experts of a token gave, summed: [n, hidden], the same on each tensor-parallel rank.

        out: [m, hidden], for each row of `routed` the weighted sum of what this rank's experts gave. partial: [n,
        hidden], this rank's part of something else that is summed over the tensor-parallel ranks and added.
        """


class TensorParallelDispatch:
    """All tokens are on every rank that holds a part of an expert, or some of the experts: nothing travels, and the
    results are summed over the tensor-parallel ranks. Two cases: every expert is cut (`slots` None), or a replica alone
    holds whole experts."""

    def __init__(self, tp: Axis, slots: Tensor | None = None) -> None:
        """slots: int64 [experts], a number among this rank's experts or -1; None: this rank has a part of each."""
        self.tp = tp
        self.slots = slots

    def begin_step(self, tokens: int) -> None:
        pass

    def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Routed:
        return Routed(x, experts if self.slots is None else self.slots[experts], weights)

    def combine(self, routed: Routed, out: Tensor, partial: Tensor | None) -> Tensor:
        return self.tp.comm.all_reduce(out if partial is None else out + partial)
