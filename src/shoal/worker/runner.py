"""One step on one rank: a plan in, a result out."""

import time

import torch

from shoal import wire
from shoal.kernels.base import KVCache
from shoal.models.decoder import Decoder
from shoal.parallel.mesh import Axis
from shoal.worker.batch import SequenceTable, StepInput
from shoal.worker.sampler import Logprobs, VocabShare, logprobs, sample


class Runner:
    def __init__(
        self, model: Decoder, caches: list[KVCache], table: SequenceTable, share: VocabShare, tp: Axis
    ) -> None:
        self._model = model
        self._caches = caches
        self._table = table
        self._share = share
        self._tp = tp

    def execute(self, plan: wire.StepPlan) -> wire.StepResult:
        """Every rank gives the same result, because every rank samples the same tokens."""
        begun = time.perf_counter_ns()
        self._table.apply(plan)
        forward_ns = 0
        out: tuple[wire.SeqOut, ...] = ()
        if plan.work:
            step = self._table.build(plan.work)
            forward_begun = time.perf_counter_ns()
            logits = self._forward(step)
            forward_ns = time.perf_counter_ns() - forward_begun
            out = self._sample(step, logits) if logits is not None else ()
        total_ns = time.perf_counter_ns() - begun
        return wire.StepResult(plan.incarnation, plan.step, out, wire.StepTimes(total_ns // 1000, forward_ns // 1000))

    def _forward(self, step: StepInput) -> torch.Tensor | None:
        hidden = self._model.hidden(step.tokens, step.batch, self._caches, step.logit_rows)
        logits = self._model.logits(hidden) if step.sampling else None
        if hidden.is_cuda:
            torch.cuda.current_stream().synchronize()
        return logits

    def _sample(self, step: StepInput, logits: torch.Tensor) -> tuple[wire.SeqOut, ...]:
        if step.sampling is None:
            return ()
        chosen = sample(logits, self._share, self._tp, step.sampling)
        tokens = chosen.tolist()
        self._table.record(step.sampled, tokens)
        if step.sampling.logprobs < 0:
            return tuple(
                wire.SeqOut(work.seq, self._table.epoch(work.seq), (token,))
                for work, token in zip(step.sampled, tokens, strict=True)
            )
        found = logprobs(logits, self._share, self._tp, chosen, step.sampling.logprobs)
        return tuple(
            wire.SeqOut(work.seq, self._table.epoch(work.seq), (token,), self._row_logprobs(found, i, work.seq))
            for i, (work, token) in enumerate(zip(step.sampled, tokens, strict=True))
        )

    def _row_logprobs(self, found: Logprobs, row: int, seq: int) -> tuple[wire.TokenLogprobs, ...]:
        count = self._table.logprobs(seq)
        if count < 0:
            return ()
        ids, values = found.ids[row, :count].tolist(), found.values[row, :count].tolist()
        return (wire.TokenLogprobs(float(found.chosen[row]), tuple(ids), tuple(values)),)
