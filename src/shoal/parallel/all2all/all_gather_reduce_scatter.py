"""Dispatch that sends every token to every rank: an all-gather and a reduce-scatter a layer, for any routing."""

from torch import Tensor

from shoal.parallel.all2all.group import ExpertGroup
from shoal.parallel.dispatch import Routed


class AllGatherReduceScatter:
    keeps_tokens = False

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group

    def begin_step(self, tokens: int) -> None:
        self.group.begin_step(tokens)

    def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Routed:
        group = self.group
        rows = group.ep.comm.all_gather(group.pack(x, experts, weights), group.sizes)
        tokens, numbers, weights = group.unpack(rows, x, experts)
        return Routed(tokens, group.expert_map[numbers], weights)

    def combine(self, out: Tensor, partial: Tensor | None) -> Tensor:
        group = self.group
        if partial is not None:  # the reduce-scatter sums it over the replica's ranks too
            out[group.replica] += partial
        return group.gather_replica(group.ep.comm.reduce_scatter(out, group.sizes))
