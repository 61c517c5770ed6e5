"""The experts of one rank. All rows of the batch that are routed to one expert are computed together."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.kernels.base import Kernels
from shoal.kernels.linear import Linear, make_grouped_linear


class GroupedExperts:
    """A group of experts, each an MLP: `up`, `activate` and `down`. In a gated MLP `up` gives gates, then values.

    A row's result has the same bits in any batch: its products are rows of linear layers, and they are summed in the
    order in which the row lists its experts.
    """

    def __init__(
        self, up: Sequence[Linear], activate: Callable[[Tensor], Tensor], down: Sequence[Linear], kernels: Kernels
    ) -> None:
        self.count = len(up)
        self.up = make_grouped_linear(up)
        self.activate = activate
        self.down = make_grouped_linear(down)
        self.kernels = kernels

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the results of each row's experts: [m, hidden], zeros for a row without experts.

        x: [m, hidden]. experts: int64 [m, k], numbers of this rank's experts, -1 for none. weights: float32 [m, k].
        """
        pairs = self.kernels.group_pairs(experts, self.count)
        if not len(pairs.rows):
            return torch.zeros_like(x)
        inner = self.activate(self.up(x.index_select(0, pairs.rows), pairs.counts))
        return self.kernels.weighted_sum(self.down(inner, pairs.counts), pairs.places, weights)
