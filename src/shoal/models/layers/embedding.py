"""The embedding, which makes the residual stream from tokens and positions."""

import torch.nn.functional as F
from torch import Tensor

from shoal.kernels.linear import Linear
from shoal.parallel.embedding import VocabParallelEmbedding


class LearnedPositions:
    """A table with a row for each position, which is added to the embedding. `offset` is the row of position 0."""

    def __init__(self, weight: Tensor, offset: int) -> None:
        self.weight = weight
        self.offset = offset

    def __call__(self, positions: Tensor) -> Tensor:
        """Return [n, hidden] for positions: int64 [n]."""
        return F.embedding(positions + self.offset, self.weight)


class Embedding:
    """The embedding of tokens: their rows, multiplied by `scale`, projected to the hidden size, plus positions.

    All but the rows is optional.
    """

    def __init__(
        self,
        tokens: VocabParallelEmbedding,
        scale: float | None,
        project: Linear | None,
        positions: LearnedPositions | None,
    ) -> None:
        self.tokens = tokens
        # Rounded to the type of the multiplication, as in transformers.
        self.scale = None if scale is None else float(tokens.weight.new_tensor(scale))
        self.project = project
        self.positions = positions

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return [n, hidden] for tokens and positions: int64 [n]."""
        x = self.tokens(tokens)
        x = x if self.scale is None else x * self.scale
        x = self.project(x) if self.project else x
        return x + self.positions(positions) if self.positions else x
