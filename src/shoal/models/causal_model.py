"""What a rank asks of its stage of a model, whichever implementation it is."""

from typing import Protocol

from torch import Tensor

from shoal.kernels.base import KVCache, PagedBatch


class CausalModel(Protocol):
    def hidden(self, inputs: Tensor, batch: PagedBatch, caches: list[KVCache], rows: Tensor | None) -> Tensor:
        """Computes a step and fills the caches, one for each layer of the stage.

        inputs: on the first stage the tokens, int64 [n]; else the residual stream [n, hidden] as the stage before left
        it. rows: int64 [m], the tokens whose outcome is wanted (None: all).
        Gives on the last stage [m, width], what `logits` reads; else the residual stream [n, hidden], whatever `rows`.
        """

    def join(self) -> None:
        """Takes part in a step in which this replica has no token: in what its mixtures of experts exchange."""

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [m, width]. This rank's share of the vocabulary: float32 [m, rows of the head].

        Raises:
            EngineError: this is not the last stage.
        """
