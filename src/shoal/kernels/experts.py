"""The experts of one rank. All rows of the batch that are routed to one expert are computed in one product."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.kernels.base import Kernels
from shoal.kernels.linear import Linear


class GroupedExperts:
    """A group of experts, each an MLP: `up`, `activate` and `down`. In a gated MLP `up` gives gates, then values.

    A row's result has the same bits in any batch: its products are rows of linear layers, and they are summed in the
    order in which the row lists its experts.
    """

    def __init__(
        self, up: Sequence[Linear], activate: Callable[[Tensor], Tensor], down: Sequence[Linear], kernels: Kernels
    ) -> None:
        self.up = up
        self.activate = activate
        self.down = down
        self.kernels = kernels

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the results of each row's experts: [m, hidden], zeros for a row without experts.

        x: [m, hidden]. experts: int64 [m, k], numbers of this rank's experts, -1 for none. weights: float32 [m, k].
        """
        pairs = experts.flatten()  # of a row and an expert
        absent, *counts = torch.bincount(pairs + 1, minlength=len(self.up) + 1).tolist()
        if absent == len(pairs):
            return torch.zeros_like(x)
        order = pairs.argsort(stable=True)
        indices = order.argsort() - absent  # the row of each pair in the results below; negative without an expert
        rows_by_expert = order[absent:] // experts.shape[1]
        inner = self.activate(_apply_grouped(self.up, x.index_select(0, rows_by_expert), counts))
        return self.kernels.weighted_sum(_apply_grouped(self.down, inner, counts), indices.view(experts.shape), weights)


def _apply_grouped(linears: Sequence[Linear], rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Apply each layer to its rows: the first `counts[0]` rows are those of the first layer, and so on."""
    groups = zip(linears, rows.split(counts), counts, strict=True)
    return torch.cat([linear(group) for linear, group, count in groups if count])
