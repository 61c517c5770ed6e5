"""State that the dispatch backends share: owners of experts, each rank's share of the tokens, and packed rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.parallel.mesh import Axis
from shoal.parallel.partition import split


def make_expert_map(held: Sequence[int], experts: int, device: torch.device) -> Tensor:
    """Return the map from an expert to its index in `held`, or to -1 if it is not there: int64 [experts]."""
    expert_map = torch.full((experts,), -1, device=device)
    expert_map[list(held)] = torch.arange(len(held), device=device)
    return expert_map


class ExpertGroup:
    """One rank's view of the ranks that hold a stage's experts.

    The tensor-parallel ranks of a replica all have the same tokens. Each of them sends a share of these, so that a
    token is sent by one rank alone.
    """

    def __init__(self, ep: Axis, tp: Axis, placement: Sequence[Sequence[int]], device: torch.device) -> None:
        """`ep` has the tensor-parallel ranks of the first replica, then those of the next, and so on. `placement` has
        the experts of each rank of `ep`; every expert occurs once."""
        experts = sum(len(held) for held in placement)
        self.ep = ep
        self.tp = tp
        self.owners = torch.empty(experts, dtype=torch.int64, device=device)
        for rank, held in enumerate(placement):
            self.owners[list(held)] = rank
        self.expert_map = make_expert_map(placement[ep.rank], experts, device)
        self.share = slice(0)  # those of the replica's tokens that this rank sends
        self.shares: Sequence[int] = ()  # number of tokens that each tensor-parallel rank of the replica sends
        self.sizes: Sequence[int] = ()  # number of tokens that each rank of `ep` sends

    def begin_step(self, tokens: int) -> None:
        count = torch.tensor([tokens], device=self.owners.device)
        counts = self.ep.comm.all_gather(count, [1] * self.ep.size).tolist()
        shares = [[len(share) for share in split(count, self.tp.size)] for count in counts[:: self.tp.size]]
        self.sizes = [size for replica in shares for size in replica]
        self.shares = shares[self.ep.rank // self.tp.size]
        start = sum(self.shares[: self.tp.rank])
        self.share = slice(start, start + self.shares[self.tp.rank])

    @property
    def replica(self) -> slice:
        """The position of the replica's tokens among the tokens of all replicas."""
        first = self.ep.rank - self.tp.rank
        start = sum(self.sizes[:first])
        return slice(start, start + sum(self.shares))

    def pack(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Return this rank's share as uint8 [tokens, bytes]: each row has a token, its experts and their weights."""
        parts = (x[self.share], experts[self.share].int(), weights[self.share])
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    def unpack(self, rows: Tensor, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Undo `pack`: return tokens with x's width and dtype, their experts (int64) and weights (float32)."""
        k = experts.shape[1]
        parts = rows.split([x.shape[1] * x.itemsize, 4 * k, 4 * k], dim=1)
        dtypes = (x.dtype, torch.int32, torch.float32)
        tokens, numbers, weights = (part.contiguous().view(dtype) for part, dtype in zip(parts, dtypes, strict=True))
        return tokens, numbers.long(), weights

    def gather_replica(self, rows: Tensor) -> Tensor:
        """Return all of the replica's tokens, [n, hidden], from the shares of its tensor-parallel ranks."""
        return self.tp.comm.all_gather(rows, self.shares)
