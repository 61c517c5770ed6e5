"""What a rank asks of a model, whichever implementation it is."""

from typing import Protocol

from torch import Tensor

from shoal.kernels.base import KVCache, PagedBatch
from shoal.kernels.linear import Linear


class CausalModel(Protocol):
    head: Linear

    def hidden(self, tokens: Tensor, batch: PagedBatch, caches: list[KVCache], rows: Tensor | None) -> Tensor:
        """Computes a step and fills the caches, one a layer.

        tokens: int64 [n]; rows: int64 [m], the tokens whose outcome is wanted (None: all). Gives [m, width]: what
        `logits` reads.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [m, width]. This rank's share of the vocabulary: float32 [m, rows of the head]."""
