"""What the backends share: who holds an expert, who stands for a token in this step, and tokens as rows of bytes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.parallel.mesh import Axis
from shoal.parallel.partition import split


def slots_of(held: Sequence[int], experts: int, device: torch.device) -> Tensor:
    """int64 [experts]: an expert's number among those `held`, -1 for the others."""
    slots = torch.full((experts,), -1, device=device)
    slots[list(held)] = torch.arange(len(held), device=device)
    return slots


class ExpertGroup:
    """The ranks that hold a stage's experts, as one of them sees them.

    A replica's tokens are the same on its tensor-parallel ranks; each of these stands for a share of them, so that a
    token is sent by one rank alone.
    """

    def __init__(self, ep: Axis, tp: Axis, placement: Sequence[Sequence[int]], device: torch.device) -> None:
        """`ep` has the replicas one after the other, each with its tensor-parallel ranks. `placement`: every expert
        once, by rank of `ep`."""
        experts = sum(len(held) for held in placement)
        self.ep = ep
        self.tp = tp
        self.owners = torch.empty(experts, dtype=torch.int64, device=device)
        for rank, held in enumerate(placement):
            self.owners[list(held)] = rank
        self.slots = slots_of(placement[ep.rank], experts, device)
        self.share = slice(0)  # of the replica's tokens: those that this rank stands for
        self.shares: Sequence[int] = ()  # how many each tensor-parallel rank stands for
        self.sizes: Sequence[int] = ()  # how many each rank of `ep` stands for

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
        """The replica's tokens among those of all."""
        first = self.ep.rank - self.tp.rank
        start = sum(self.sizes[:first])
        return slice(start, start + sum(self.shares))

    def pack(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """uint8 [tokens of this rank's share, bytes]: a token, its experts and their weights travel together."""
        parts = (x[self.share], experts[self.share].int(), weights[self.share])
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1)

    def unpack(self, rows: Tensor, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of `pack`: tokens in x's form, their experts (int64) and weights (float32)."""
        k = experts.shape[1]
        parts = rows.split([x.shape[1] * x.itemsize, 4 * k, 4 * k], dim=1)
        dtypes = (x.dtype, torch.int32, torch.float32)
        tokens, numbers, weights = (part.contiguous().view(dtype) for part, dtype in zip(parts, dtypes, strict=True))
        return tokens, numbers.long(), weights

    def whole(self, rows: Tensor) -> Tensor:
        """[n, hidden], all of the replica's tokens, from the shares of its ranks."""
        return self.tp.comm.all_gather(rows, self.shares)
