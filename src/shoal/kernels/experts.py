"""The experts of one rank, computed in groups: all rows of an expert in one product, whoever they belong to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.kernels.base import Kernels
from shoal.kernels.linear import Linear


class GroupedExperts:
    """Each expert is an MLP: `up`, which with a gate gives gates and values side by side, `activate`, and `down`.

    A row's result has the same bits whatever else is in the batch: its products are rows of linear layers, and they
    are summed in the order in which the row names its experts.
    """

    def __init__(
        self, up: Sequence[Linear], activate: Callable[[Tensor], Tensor], down: Sequence[Linear], kernels: Kernels
    ) -> None:
        self.up = up
        self.activate = activate
        self.down = down
        self.kernels = kernels

    def __call__(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x: [m, hidden]. experts: int64 [m, k], each one's number here, -1 for none. weights: float32 [m, k].

        Gives [m, hidden]: the weighted sum of what a row's experts made of it, zeros for a row without any.
        """
        pairs = experts.flatten()
        absent, *counts = torch.bincount(pairs + 1, minlength=len(self.up) + 1).tolist()
        if absent == len(pairs):
            return torch.zeros_like(x)
        order = pairs.argsort(stable=True)
        places = order.argsort() - absent  # of each pair among the rows below; where there is no expert, below 0
        rows_of_groups = order[absent:] // experts.shape[1]
        inner = self.activate(_in_groups(self.up, x.index_select(0, rows_of_groups), counts))
        return self.kernels.weighted_sum(_in_groups(self.down, inner, counts), places.view(experts.shape), weights)


def _in_groups(linears: Sequence[Linear], rows: Tensor, counts: Sequence[int]) -> Tensor:
    """rows: first those of the first layer, `counts[0]` of them, and so on."""
    groups = zip(linears, rows.split(counts), counts, strict=True)
    return torch.cat([linear(group) for linear, group, count in groups if count])
