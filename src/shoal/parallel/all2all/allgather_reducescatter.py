"""Every token to every rank, and the sums of what they gave back: two collectives a layer, whatever was routed."""

from torch import Tensor

from shoal.parallel.all2all.group import ExpertGroup
from shoal.parallel.dispatch import Routed


class AllGatherReduceScatter:
    def __init__(self, group: ExpertGroup) -> None:
        self.group = group

    def begin_step(self, tokens: int) -> None:
        self.group.begin_step(tokens)

    def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Routed:
        group = self.group
        rows = group.ep.comm.all_gather(group.pack(x, experts, weights), group.sizes)
        tokens, numbers, shares = group.unpack(rows, x, experts)
        return Routed(tokens, group.slots[numbers], shares)

    def combine(self, routed: Routed, out: Tensor, partial: Tensor | None) -> Tensor:
        group = self.group
        if partial is not None:  # summed over the replica's ranks along with the rest
            out[group.replica] += partial
        return group.whole(group.ep.comm.reduce_scatter(out, group.sizes))
