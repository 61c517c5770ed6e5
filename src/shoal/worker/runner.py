"""The runner of steps on one rank: it takes a plan and returns a result, and exchanges tensors with other stages."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.base import KVCache
from shoal.kernels.top_outputs import TopOutputs
from shoal.models.causal_model import CausalModel
from shoal.parallel.mesh import Axis
from shoal.parallel.pipeline import Pipeline
from shoal.wire.base import Ids
from shoal.wire.ranks import PromptLogprobs, SeqOut, StepMask, StepPlan, StepResult, StepTimes, TokenLogprobs
from shoal.worker.draft_model import DraftModel
from shoal.worker.logit_edits import Edits, Masks
from shoal.worker.recorded_steps import RecordedSteps
from shoal.worker.sampler import Logprobs, SamplingRows, VocabShare, logprobs, sample, sample_top
from shoal.worker.sequence_table import SequenceTable
from shoal.worker.step_input import PromptRows, StepInput
from shoal.worker.token_return import TokenReturn

# How many prompt tokens' logits are computed at a time; with a vocabulary of 150,000 tokens they take 38 MB.
PROMPT_ROWS = 64


@dataclass(frozen=True, slots=True)
class _MaskedStep:
    """A step whose forward pass is computed, and which may have to wait for its mask."""

    plan: StepPlan
    step: StepInput
    hidden: Tensor  # [rows, hidden size]
    spent_ns: int  # time spent on the step so far
    forward_ns: int  # ... and the part of it that the forward pass took


class Runner:
    """The runner of steps on one rank. The last stage draws the tokens of a step; results of other stages are empty."""

    def __init__(
        self,
        model: CausalModel,
        caches: list[KVCache],
        table: SequenceTable,
        share: VocabShare,
        tp: Axis,
        pipeline: Pipeline,
        *,
        draft: DraftModel | None = None,
        record_steps: bool = True,
    ) -> None:
        self._model = model
        self._steps = RecordedSteps(model, caches, table.buffers, alone=tp.size == 1, enabled=record_steps)
        self._table = table
        self._share = share
        self._tp = tp
        self._pipeline = pipeline
        self._token_return = TokenReturn(pipeline, table)
        self._draft = draft
        self._pending: _MaskedStep | None = None
        self.busy_ns = 0  # time spent on all steps, without waits for other stages

    def execute(self, plan: StepPlan) -> StepResult | None:
        """Compute a step, and return its result.

        All ranks of the last stage return the same result, because all draw the same tokens. For a masked plan they
        return None, and draw the tokens when the mask has arrived.
        """
        begun = self._now()
        self._table.apply(plan)
        if not plan.work:
            if plan.lockstep:
                self._model.join()
            return self._result(plan, (), self._now() - begun, 0)
        self._token_return.read_for(plan)
        step = self._table.build(plan.work)
        forward_begun = self._now()
        hidden = self._forward(step)
        now = self._now()
        pending = _MaskedStep(plan, step, hidden, now - begun, now - forward_begun)
        if not self._pipeline.last:
            return self._pass_on(pending)
        if step.masked_rows:
            self._pending = pending
            return None
        return self._finish(pending, step.sampling)

    def apply_mask(self, mask: StepMask) -> StepResult | None:
        """Draw the tokens of the step that waits for this mask, and return its result; None if no step does."""
        pending = self._pending
        if pending is None or pending.plan.step != mask.step or pending.step.sampling is None:
            return None
        self._pending = None
        bits = torch.from_numpy(np.frombuffer(mask.bits, "<i4").reshape(-1, mask.words).copy())
        rows = torch.tensor(pending.step.masked_rows)
        masks = Masks(rows.to(pending.hidden.device), bits.to(pending.hidden.device))
        edits = dataclasses.replace(pending.step.sampling.edits or Edits(), masks=masks)
        return self._finish(pending, dataclasses.replace(pending.step.sampling, edits=edits))

    def settle(self) -> None:
        """Receive what is still on its way between stages, after all plans so far have been executed."""
        self._token_return.read_all()

    def _now(self) -> int:
        """Return the time in nanoseconds, on a clock that stops while this stage waits for another."""
        return time.perf_counter_ns() - self._pipeline.waited_ns

    def _forward(self, step: StepInput) -> Tensor:
        inputs = step.tokens if self._pipeline.first else self._pipeline.receive(len(step.tokens))
        hidden = self._steps.hidden(inputs, step.batch, step.logit_rows)
        if self._draft is not None:
            self._draft.follow(step)
        if hidden.is_cuda:
            torch.cuda.current_stream().synchronize()
        return hidden

    def _pass_on(self, pending: _MaskedStep) -> StepResult:
        begun = self._now()
        self._pipeline.send(pending.hidden)
        if self._pipeline.first:
            self._token_return.expect(pending.plan.step, pending.step.sampled)
        return self._result(pending.plan, (), pending.spent_ns + self._now() - begun, pending.forward_ns)

    def _finish(self, pending: _MaskedStep, sampling: SamplingRows | None) -> StepResult:
        begun = self._now()
        step, hidden = pending.step, pending.hidden
        forward_ns = pending.forward_ns
        sampled: Sequence[SeqOut] = ()
        if sampling is not None:
            scores = self._scores(hidden[: len(sampling.temperature)], sampling)
            forward_ns += self._now() - begun
            sampled = self._sample(step, sampling, scores)
        prompts = self._prompt_logprobs(step.prompts, hidden) if step.prompts else {}
        out = tuple(self._add_prompts(sampled, prompts)) if prompts else tuple(sampled)
        return self._result(pending.plan, out, pending.spent_ns + self._now() - begun, forward_ns)

    def _scores(self, hidden: Tensor, sampling: SamplingRows) -> Tensor | TopOutputs:
        """Return what tokens are drawn from: logits, or if that is enough the top logit of each row and its token."""
        tops = self._model.top_tokens(hidden, self._share.start) if sampling.only_tops else None
        if tops is not None:
            return tops
        logits = self._model.logits(hidden)
        return logits if sampling.only_tops else logits.float()  # a copy, which an argmax does not need

    def _sample(self, step: StepInput, sampling: SamplingRows, scores: Tensor | TopOutputs) -> list[SeqOut]:
        """Draw the tokens of a step, and return its outputs."""
        found = None
        if isinstance(scores, Tensor):
            chosen = sample(scores, self._share, self._tp, sampling)
            if sampling.logprobs >= 0:
                found = logprobs(scores, self._share, self._tp, chosen, sampling.logprobs)
        else:
            chosen = sample_top(*scores, self._tp)
        drawn = chosen.tolist()
        if step.plain and self._draft is None:
            self._return_tokens([(token,) for token in drawn])
            epochs = self._table.record_plain(step.sampled, drawn)
            return [
                SeqOut(work.seq, epoch, (token,))
                for work, epoch, token in zip(step.sampled, epochs, drawn, strict=True)
            ]
        return list(self._keep_accepted(step, drawn, found))

    def _keep_accepted(self, step: StepInput, drawn: Sequence[int], found: Logprobs | None) -> Iterator[SeqOut]:
        """Yield the outputs of a step, with the drawn tokens that are kept."""
        taken, first = [], 0
        for work in step.sampled:
            taken.append(_accepted_tokens(work.drafts, drawn[first : first + 1 + len(work.drafts)]))
            self._table.record(work, taken[-1])
            first += 1 + len(work.drafts)
        self._return_tokens(taken)
        proposed = [()] * len(taken) if self._draft is None else self._draft.propose(step.sampled, taken)
        first = 0
        for work, tokens, drafts in zip(step.sampled, taken, proposed, strict=True):
            own = () if found is None else _token_logprobs(found, first, len(tokens), self._table.logprobs(work.seq))
            yield SeqOut(work.seq, self._table.epoch(work.seq), tuple(tokens), own, drafts=drafts)
            first += 1 + len(work.drafts)

    def _return_tokens(self, taken: Sequence[Sequence[int]]) -> None:
        """Send the last drawn token of each sequence to the first stage."""
        if not self._pipeline.first:
            self._pipeline.send_tokens(torch.tensor([tokens[-1] for tokens in taken]))

    def _prompt_logprobs(self, prompts: Sequence[PromptRows], hidden: Tensor) -> dict[int, PromptLogprobs]:
        """Return the log-probabilities of prompt tokens, by sequence.

        Their hidden states are the last rows of `hidden`. Only some rows of logits are computed at a time, because they
        take much memory.
        """
        found: dict[int, PromptLogprobs] = {}
        first = len(hidden) - sum(len(each.targets) for each in prompts)
        for each in prompts:
            entries: list[TokenLogprobs] = []
            for start in range(0, len(each.targets), PROMPT_ROWS):
                targets = torch.tensor(each.targets[start : start + PROMPT_ROWS], device=hidden.device)
                logits = self._model.logits(hidden[first + start : first + start + len(targets)]).float()
                rows = logprobs(logits, self._share, self._tp, targets, each.logprobs)
                entries += _token_logprobs(rows, 0, len(targets), each.logprobs)
            found[each.seq] = PromptLogprobs(each.start, tuple(entries))
            first += len(each.targets)
        return found

    def _add_prompts(self, sampled: Sequence[SeqOut], prompts: dict[int, PromptLogprobs]) -> Iterator[SeqOut]:
        """Yield the outputs of a step with the log-probabilities of prompts, also for sequences that drew no token."""
        for out in sampled:
            entries = prompts.pop(out.seq, None)
            yield SeqOut(out.seq, out.epoch, out.tokens, out.logprobs, entries, out.drafts)
        for seq, rest in prompts.items():
            yield SeqOut(seq, self._table.epoch(seq), (), prompt_logprobs=rest)

    def _result(self, plan: StepPlan, out: tuple[SeqOut, ...], total_ns: int, forward_ns: int) -> StepResult:
        self.busy_ns += total_ns
        return StepResult(plan.incarnation, plan.step, out, StepTimes(total_ns // 1000, forward_ns // 1000))


def _accepted_tokens(drafts: Ids, drawn: Sequence[int]) -> Sequence[int]:
    """Return the drawn tokens up to and including the first that differs from its draft.

    The tokens after it were drawn for a text that will not be.
    """
    accepted = next(
        (i for i, (draft, token) in enumerate(zip(drafts, drawn, strict=False)) if draft != token), len(drafts)
    )
    return drawn[: accepted + 1]


def _token_logprobs(found: Logprobs, first: int, rows: int, count: int) -> tuple[TokenLogprobs, ...]:
    """Return the log-probabilities of `rows` rows from `first` on, each with the `count` likeliest tokens.

    With a count of -1 there are none.
    """
    if count < 0:
        return ()
    taken = slice(first, first + rows)
    return tuple(
        TokenLogprobs(chosen, rank, tuple(ids), tuple(values))
        for chosen, rank, ids, values in zip(
            found.chosen[taken].tolist(),
            found.ranks[taken].tolist(),
            found.ids[taken, :count].tolist(),
            found.values[taken, :count].tolist(),
            strict=True,
        )
    )
