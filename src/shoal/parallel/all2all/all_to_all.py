"""Tokens to the ranks that hold one of their experts, once to each; counts go first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.parallel.all2all.group import ExpertGroup
from shoal.parallel.dispatch import Routed


class AllToAll:
    def __init__(self, group: ExpertGroup) -> None:
        self.group = group
        # Of the layer between `dispatch` and `combine`:
        self._tokens = torch.empty(0)  # int64, of this rank's share: what it sent, rank by rank
        self._sent: Sequence[int] = ()  # rows to each rank
        self._received: Sequence[int] = ()  # rows from each rank

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
        tokens, numbers, shares = group.unpack(rows, x, experts)
        return Routed(tokens, group.slots[numbers], shares)

    def combine(self, routed: Routed, out: Tensor, partial: Tensor | None) -> Tensor:
        group, sent = self.group, self._sent
        back = group.ep.comm.all_to_all(out, self._received, sent)
        total = out.new_zeros((group.shares[group.tp.rank], out.shape[1]), dtype=torch.float32)
        # Rank by rank, in which no token is twice: its sum has the same order in any batch.
        for tokens, rows in zip(self._tokens.split(sent), back.split(sent), strict=True):
            total.index_add_(0, tokens, rows.float())
        if partial is not None:
            total += group.tp.comm.reduce_scatter(partial, group.shares)
        return group.whole(total.to(out.dtype))
