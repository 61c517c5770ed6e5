"""The token embedding, whose rows are split over a tensor-parallel axis."""

from torch import Tensor, nn

from shoal.parallel.mesh import Axis


class VocabParallelEmbedding:
    """A token embedding: each rank looks up the tokens whose rows it holds, and the results are summed."""

    def __init__(self, weight: Tensor, rows: range, tp: Axis) -> None:
        self.weight = weight
        self.rows = rows
        self.tp = tp

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [n, hidden] of tokens, int64 [n]."""
        if self.tp.size == 1:
            return nn.functional.embedding(tokens, self.weight)
        if not self.rows:
            return self.tp.comm.all_reduce(self.weight.new_zeros((len(tokens), self.weight.shape[1])))
        local = tokens - self.rows.start
        elsewhere = (local < 0) | (local >= len(self.rows))
        found = nn.functional.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.tp.comm.all_reduce(found.masked_fill(elsewhere.unsqueeze(-1), 0))
