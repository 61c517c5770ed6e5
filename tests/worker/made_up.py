"""A made-up model, which is a table: logits depend only on the last token."""

from typing import cast

import torch
from torch import Tensor

from shoal.comm.local import LocalComm
from shoal.kernels.base import KVCache, PagedBatch
from shoal.kernels.top_outputs import TopOutputs
from shoal.models.causal_model import CausalModel
from shoal.parallel.mesh import Axis
from shoal.parallel.pipeline import Pipeline
from shoal.worker.sampler import VocabShare

VOCABULARY = 40
SHARE = VocabShare(0, (VOCABULARY,))
ALONE = Axis("tp", 0, 1, LocalComm())
CPU = torch.device("cpu")
ONE_STAGE = Pipeline(ALONE, ALONE, width=1, dtype=torch.float32, device=CPU, depth=2)


class TableModel:
    """A model with tokens as hidden states and rows of a table as logits. It records its calls."""

    def __init__(self, seed: int = 0) -> None:
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
        self.steps: list[tuple[list[int], PagedBatch]] = []  # the tokens and the batch of each call of `hidden`
        self.rows: list[int] = []  # the number of rows of each call of `logits`

    def hidden(self, inputs: Tensor, batch: PagedBatch, caches: list[KVCache], rows: Tensor | None) -> Tensor:
        self.steps.append((inputs.tolist(), batch))
        wanted = inputs if rows is None else inputs[rows]
        return wanted.unsqueeze(1).float()

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return self.table[hidden[:, 0].long()].clone()

    def top_tokens(self, hidden: Tensor, start: int) -> TopOutputs | None:
        return None

    def next(self, token: int) -> int:
        """Return the greedy token after this one."""
        return int(self.table[token].argmax())

    def chain(self, token: int, count: int) -> list[int]:
        """Return the `count` greedy tokens after this one."""
        found = [token]
        for _ in range(count):
            found.append(self.next(found[-1]))
        return found[1:]

    @property
    def causal(self) -> CausalModel:
        return cast(CausalModel, self)


def no_cache() -> list[KVCache]:
    return [KVCache(torch.zeros(1), torch.zeros(1))]
