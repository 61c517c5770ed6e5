"""A draft model: a small model that proposes the tokens that the large one may draw (Leviathan et al., ICML 2023).

It computes every token that the large model computes, in its own KV cache with the same block tables, so that a cached
prefix is cached for both. Then it goes on alone and makes drafts. It draws with the keys that the large model will use,
so the two agree as often as their distributions allow (Gumbel coupling). With greedy sampling, its drafts are greedy.
"""

from collections.abc import Sequence

import numpy as np
import torch

from shoal.kernels.base import KVCache
from shoal.models.causal_model import CausalModel
from shoal.parallel.mesh import Axis
from shoal.wire.base import Ids
from shoal.wire.ranks import Work
from shoal.worker.decode_batch import DecodeBuffers
from shoal.worker.recorded_steps import MOST_TOKENS, RecordedSteps
from shoal.worker.sampler import VocabShare, sample
from shoal.worker.sequence_table import SequenceTable
from shoal.worker.step_input import StepInput


class DraftModel:
    """The draft model of one rank."""

    def __init__(
        self,
        model: CausalModel,
        caches: list[KVCache],
        table: SequenceTable,
        share: VocabShare,
        tp: Axis,
        *,
        count: int,
        record_steps: bool = True,
    ) -> None:
        """Take over a loaded model.

        Args:
            caches: the draft model's own KV cache, by layer.
            count: how many drafts to make at a time.
            record_steps: record the decoding steps where that is possible.
        """
        self._model = model
        buffers = DecodeBuffers(MOST_TOKENS, table.buffers.max_blocks, table.buffers.block_size)
        self._steps = RecordedSteps(model, caches, buffers, alone=tp.size == 1, enabled=record_steps)
        self._device = caches[0].keys.device
        self._table = table
        self._share = share
        self._tp = tp
        self._count = count

    def follow(self, step: StepInput) -> None:
        """Compute the tokens of a step, only for their keys and values."""
        nothing = torch.zeros(0, dtype=torch.int64, device=step.tokens.device)
        self._steps.hidden(step.tokens, step.batch, nothing)

    def propose(self, works: Sequence[Work], sampled: Sequence[Sequence[int]]) -> list[Ids]:
        """Return drafts for the tokens after those that were just drawn.

        Args:
            works: the works of the step for which tokens were drawn.
            sampled: the drawn tokens of each work that were kept.
        """
        seqs = [work.seq for work in works]
        # The position of the last drawn token: after the known tokens of the work and its accepted drafts.
        positions = np.array(
            [
                work.start + work.count - len(work.drafts) + len(tokens) - 1
                for work, tokens in zip(works, sampled, strict=True)
            ],
            np.int64,
        )
        tokens = torch.tensor([tokens[-1] for tokens in sampled], device=self._device)
        drafts: list[list[int]] = []
        for _ in range(self._count):
            batch, sampling = self._table.draft_step(seqs, positions)
            hidden = self._steps.hidden(tokens, batch, None)
            tokens = sample(self._model.logits(hidden).float(), self._share, self._tp, sampling)
            drafts.append(tokens.tolist())
            positions = positions + 1
        return [tuple(each) for each in zip(*drafts, strict=True)]
