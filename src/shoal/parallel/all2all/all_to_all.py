"""Dispatch that sends a token once to each rank that holds one of its experts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.parallel.all2all.group import ExpertGroup
from shoal.parallel.dispatch import Routed


class AllToAll:
    """Dispatch by three all-to-all operations a layer: counts of rows, the rows, and their results."""

    keeps_tokens = False

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group
        # `dispatch` keeps these for the `combine` of the same layer:
        self._tokens = torch.empty(0)  # int64: the tokens of this rank's share that it sent, ordered by receiving rank
        self._sent: Sequence[int] = ()  # rows sent to each rank
        self._received: Sequence[int] = ()  # rows received from each rank

    def begin_step(self, tokens: int) -> None:
        self.group.begin_step(tokens)

    def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Routed:
        group, comm, size = self.group, self.group.ep.comm, self.group.ep.size
        rows = group.pack(x, experts, weights)
        wanted = torch.zeros(len(rows), size, dtype=torch.bool, device=x.device)
        wanted.scatter_(1, group.owners[experts[group.share]], True)
        counts = wanted.sum(0)
        self._received = comm.all_to_all(counts, [1] * size, [1] * size).tolist()
        self._sent = counts.tolist()
        self._tokens = wanted.t().nonzero()[:, 1]
        rows = comm.all_to_all(rows.index_select(0, self._tokens), self._sent, self._received)
        tokens, numbers, weights = group.unpack(rows, x, experts)
        return Routed(tokens, group.expert_map[numbers], weights)

    def combine(self, out: Tensor, partial: Tensor | None) -> Tensor:
        group, sent = self.group, self._sent
        back = group.ep.comm.all_to_all(out, self._received, sent)
        total = out.new_zeros((group.shares[group.tp.rank], out.shape[1]), dtype=torch.float32)
        # Adding rank by rank gives each token's sum the same order in any batch: a rank has a token at most once.
        for tokens, rows in zip(self._tokens.split(sent), back.split(sent), strict=True):
            total.index_add_(0, tokens, rows.float())
        if partial is not None:
            total += group.tp.comm.reduce_scatter(partial, group.shares)
        return group.gather_replica(total.to(out.dtype))
