"""From tokens to the residual stream."""

import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.linear import Linear
from shoal.parallel.embedding import VocabParallelEmbedding


class LearnedPositions:
    """A row for each position, added to the embedding. `offset` is the row of position 0."""

    def __init__(self, weight: Tensor, offset: int) -> None:
        self.weight = weight
        self.offset = offset

    def __call__(self, positions: Tensor) -> Tensor:
        """positions: int64 [n]. Gives [n, hidden]."""
        return F.embedding(positions + self.offset, self.weight)


class Embedding:
    """The tokens' rows; where the model has them, times `scale`, led into the hidden size, and with positions."""

    def __init__(
        self,
        tokens: VocabParallelEmbedding,
        scale: float | None,
        project: Linear | None,
        positions: LearnedPositions | None,
    ) -> None:
        self.tokens = tokens
        # Rounded to the type it is multiplied in, as in transformers.
        self.scale = None if scale is None else float(tokens.weight.new_tensor(scale))
        self.project = project
        self.positions = positions

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens, positions: int64 [n]. Gives [n, hidden]."""
        x = self.tokens(tokens)
        x = x if self.scale is None else x * self.scale
        x = self.project(x) if self.project else x
        return x + self.positions(positions) if self.positions else x
