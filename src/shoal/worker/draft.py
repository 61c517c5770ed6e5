"""A draft model: a small one that guesses what the large one will say (Leviathan et al., ICML 2023).

It computes whatever the large one computes, in a cache of its own under the same block table, so that prefixes that
are found are found for both. Then it goes ahead alone. Its draws use the keys that the large model's will use, so
that the two agree as often as their distributions allow (the Gumbel coupling), and greedy follows greedy.
"""

from collections.abc import Sequence

import numpy as np
import torch

from shoal.kernels.base import KVCache
from shoal.models.causal_model import CausalModel
from shoal.parallel.mesh import Axis
from shoal.wire.base import Ids
from shoal.wire.ranks import Work
from shoal.worker.batch import SequenceTable, StepInput
from shoal.worker.sampler import VocabShare, sample


class Draft:
    def __init__(
        self,
        model: CausalModel,
        caches: list[KVCache],
        table: SequenceTable,
        share: VocabShare,
        tp: Axis,
        *,
        count: int,
    ) -> None:
        self._model = model
        self._caches = caches
        self._table = table
        self._share = share
        self._tp = tp
        self._count = count

    def follow(self, step: StepInput) -> None:
        """Computes a step's tokens, for their keys and values alone."""
        nothing = torch.zeros(0, dtype=torch.int64, device=step.tokens.device)
        self._model.hidden(step.tokens, step.batch, self._caches, nothing)

    def guess(self, works: Sequence[Work], sampled: Sequence[Sequence[int]]) -> list[Ids]:
        """What may follow the tokens that were sampled just now."""
        seqs = [work.seq for work in works]
        # Of the last token known: behind the work's own tokens, less the drafts among them that were wrong.
        positions = np.array(
            [
                work.start + work.count - len(work.drafts) + len(tokens) - 1
                for work, tokens in zip(works, sampled, strict=True)
            ],
            np.int64,
        )
        tokens = torch.tensor([tokens[-1] for tokens in sampled], device=self._device)
        guesses: list[list[int]] = []
        for _ in range(self._count):
            batch, sampling = self._table.ahead(seqs, positions)
            hidden = self._model.hidden(tokens, batch, self._caches, None)
            tokens = sample(self._model.logits(hidden), self._share, self._tp, sampling)
            guesses.append(tokens.tolist())
            positions = positions + 1
        return [tuple(each) for each in zip(*guesses, strict=True)]

    @property
    def _device(self) -> torch.device:
        return self._caches[0].keys.device
