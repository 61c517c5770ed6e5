"""The table of the sequences that a rank remembers, which builds the tensors of a step.

A step plan says only what is new. The table has the blocks, the last token and the sampling parameters of each
sequence, in arrays with one row for each sequence, so that most tensors of a step are built by indexing.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.kernels.base import PagedBatch
from shoal.wire.base import Ids
from shoal.wire.ranks import NewSeq, StepPlan, Work
from shoal.wire.tokens import TOKEN_DTYPE
from shoal.worker.decode_batch import DecodeBuffers, DecodeKind, decode_batches
from shoal.worker.random import row_keys, split_keys
from shoal.worker.sampler import SamplingRows
from shoal.worker.sampling_rules import EditsBuilder, SamplingRules
from shoal.worker.step_input import PromptRows, StepInput

# Logits divided by a smaller temperature would leave the range of float32. With such a temperature only the likeliest
# token would be drawn, so it counts as greedy.
_MIN_TEMPERATURE = 1e-5
# Parameters are clamped to the range of float32, which does not change the result.
_MAX_TEMPERATURE = 1e30
_MIN_TOP_P = 1e-30

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Sequence:
    row: int  # in the arrays of the table
    epoch: int
    tokens: Int32  # those of the NewSeq; of the tokens drawn later, the table has only the last one
    num_prompt_tokens: int
    num_blocks: int
    logprobs: int
    prompt_logprobs: int
    rules: SamplingRules | None


class SequenceTable:
    """The sequences of one rank."""

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        device: torch.device,
        scratch_slot: int = 0,
        *,
        samples: bool = True,
        most_decoded: int = 0,
    ) -> None:
        """Make an empty table.

        Args:
            scratch_slot: the slot of the KV cache for keys and values that must not be written to their own slot.
            samples: True on the last stage, which draws tokens. Other stages do not build what only drawing needs.
            most_decoded: the most tokens of a decoding step, with drafts; `buffers` have room for at least
                `max_num_seqs`.
        """
        self._samples = samples
        self._block_size = block_size
        self._device = device
        self._max_model_len = max_model_len
        self._scratch_slot = scratch_slot
        self._sequences: dict[int, _Sequence] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._blocks: Int32 = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._written: Int64 = np.zeros(max_num_seqs, np.int64)  # positions before this are in shared blocks: read-only
        self._last_token: Int64 = np.zeros(max_num_seqs, np.int64)
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._sample_index = np.zeros(max_num_seqs, np.uint64)
        self._num_given: Int64 = np.zeros(max_num_seqs, np.int64)  # tokens of the NewSeq
        self._plain = np.zeros(max_num_seqs, np.bool_)  # no edits and no log-probabilities are wanted
        self.buffers = DecodeBuffers(max(most_decoded, max_num_seqs), self._blocks.shape[1], block_size)
        self._decodes = decode_batches(
            self.buffers,
            scratch_slot,
            blocks=self._blocks,
            written=self._written,
            last_token=self._last_token,
            num_given=self._num_given,
            plain=self._plain,
            temperature=self._temperature,
        )
        self._greedy: dict[int, SamplingRows] = {}  # the parameters of so many greedy rows without edits

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, plan: StepPlan) -> None:
        """Apply a plan: forget and add sequences, and append blocks to them."""
        for seq in plan.released:
            self._free_rows.append(self._sequences.pop(seq).row)
        for new in plan.new:
            self._admit(new)
        for work in plan.work:
            if work.blocks:
                self._append_blocks(self._sequences[work.seq], work.blocks)

    def _admit(self, new: NewSeq) -> None:
        row = self._free_rows.pop()
        sampling = new.sampling
        tokens = np.frombuffer(new.tokens, TOKEN_DTYPE)
        rules = None
        if self._samples:
            rules = SamplingRules.of(sampling, tokens[: new.num_prompt_tokens], tokens[new.num_prompt_tokens :])
        sequence = _Sequence(
            row=row,
            epoch=new.epoch,
            tokens=tokens,
            num_prompt_tokens=new.num_prompt_tokens,
            num_blocks=0,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
            rules=rules,
        )
        self._sequences[new.seq] = sequence
        self._blocks[row] = 0
        self._append_blocks(sequence, new.blocks)
        self._written[row] = len(new.blocks) * self._block_size
        greedy = sampling.temperature < _MIN_TEMPERATURE
        self._temperature[row] = 0.0 if greedy else min(sampling.temperature, _MAX_TEMPERATURE)
        self._top_k[row] = sampling.top_k
        self._top_p[row] = max(sampling.top_p, _MIN_TOP_P)
        self._min_p[row] = sampling.min_p
        self._num_given[row] = len(tokens)
        self._plain[row] = rules is None and sampling.logprobs < 0 and sampling.prompt_logprobs < 0
        self._seed[row] = sampling.seed
        self._sample_index[row] = sampling.sample_index

    def _append_blocks(self, sequence: _Sequence, blocks: Ids) -> None:
        end = sequence.num_blocks + len(blocks)
        self._blocks[sequence.row, sequence.num_blocks : end] = blocks
        sequence.num_blocks = end

    def build(self, works: Sequence[Work]) -> StepInput:
        """Return the tensors of a step. Sequences with one token come first, because kernels compute them together.

        A token with drafts after it is computed as several sequences of one token, which share their blocks. All keys
        of a step are written before any is read, so each of them sees the same context as it would alone, and attention
        computes it in the same way. So a token has the same bits with and without drafts.
        """
        if (plain := self._build_plain(works)) is not None:
            return plain
        ordered = sorted(works, key=lambda work: work.count != 1 + len(work.drafts))  # otherwise in the plan's order
        rows = np.array([self._sequences[work.seq].row for work in ordered], np.int64)
        starts = np.array([work.start for work in ordered], np.int64)
        counts = np.array([work.count for work in ordered], np.int64)
        batch = self._batch(*_split_single_tokens(ordered, rows, starts, counts))
        ends = counts.cumsum()
        wanted = [i for i, work in enumerate(ordered) if work.sample]
        tokens = self._tokens(ordered, rows, counts, ends)
        if not self._samples:
            sampled = tuple(ordered[i] for i in wanted)
            return StepInput(tokens, batch, None, sampled, sampling=None, masked_rows=(), prompts=())
        prompts = tuple(self._prompt_rows(ordered))
        return StepInput(
            tokens=tokens,
            batch=batch,
            logit_rows=self._logit_rows(ordered, ends, wanted, prompts),
            sampled=tuple(ordered[i] for i in wanted),
            sampling=self._sampling([ordered[i] for i in wanted], rows[wanted]) if wanted else None,
            masked_rows=_masked_rows(works, [ordered[i] for i in wanted]),
            prompts=prompts,
        )

    def _build_plain(self, works: Sequence[Work]) -> StepInput | None:
        """Return the tensors of a plain step, which most steps are; None if the step is another, or without C++.

        The next step overwrites them.
        """
        if self._decodes is None or not self._samples:
            return None
        rows, positions = [], []
        for work in works:
            if work.count != 1 or not work.sample or work.masked:
                return None
            rows.append(self._sequences[work.seq].row)
            positions.append(work.start)
        kind = self._decodes.write(rows, positions)
        if kind is DecodeKind.OTHER:
            return None
        tokens, batch = self.buffers.step(positions, self._device)
        if kind is DecodeKind.GREEDY:
            sampling = self._greedy_rows(len(rows))
        else:
            positions_after = np.array(positions, np.int64) + 1
            sampling = self._sampling_rows(np.array(rows), positions_after, logprobs=-1, edits=EditsBuilder())
        return StepInput(
            tokens=tokens,
            batch=batch,
            logit_rows=None,
            sampled=tuple(works),
            sampling=sampling,
            masked_rows=(),
            prompts=(),
            plain=True,
        )

    def _greedy_rows(self, count: int) -> SamplingRows:
        """Return the parameters of greedy rows. The limits of those are not read, so all steps share them."""
        found = self._greedy.get(count)
        if found is None:
            zeros = torch.zeros(count, device=self._device)
            keys = torch.zeros((count, 2), dtype=torch.int32, device=self._device)
            found = SamplingRows(zeros, zeros.long(), zeros + 1, zeros, keys, greedy=True, truncated=(), logprobs=-1)
            self._greedy[count] = found
        return found

    def _batch(self, rows: Int64, starts: Int64, counts: Int64) -> PagedBatch:
        """Return the batch of b sequences, whose rows, first positions and numbers of tokens are given as [b].

        Those with one token come first.
        """
        contexts = starts + counts
        ends = counts.cumsum()
        owner = np.repeat(np.arange(len(rows)), counts)
        positions = np.arange(len(owner)) + np.repeat(starts - ends + counts, counts)
        tables = self._blocks[rows, : -(-int(contexts.max()) // self._block_size)]
        slots = tables[owner, positions // self._block_size] * np.int64(self._block_size) + positions % self._block_size
        shared = starts < self._written[rows]
        if shared.any():
            slots = np.where(positions < self._written[rows][owner], self._scratch_slot, slots)
        return PagedBatch(
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            query_starts=self._tensor(np.concatenate([[0], ends]).astype(np.int32)),
            context_lens=self._tensor(contexts.astype(np.int32)),
            block_tables=self._tensor(tables),
            block_size=self._block_size,
            num_single=int((counts == 1).sum()),
            query_lens=tuple(counts.tolist()),
            host_context_lens=tuple(contexts.tolist()),
        )

    def _tokens(self, ordered: Sequence[Work], rows: Int64, counts: Int64, ends: Int64) -> Tensor:
        """Return the tokens of a step, int64 [n]: those of a NewSeq, the last drawn one, and drafts."""
        tokens = np.repeat(self._last_token[rows], counts)
        for work, end in zip(ordered, ends.tolist(), strict=True):
            given = self._sequences[work.seq].tokens
            if work.start < len(given):
                known = given[work.start : work.start + work.count - len(work.drafts)]
                tokens[end - work.count : end - work.count + len(known)] = known
            if work.drafts:
                tokens[end - len(work.drafts) : end] = work.drafts
        return self._tensor(tokens)

    def _prompt_rows(self, ordered: Sequence[Work]) -> Iterator[PromptRows]:
        for work in ordered:
            sequence = self._sequences[work.seq]
            stop = min(work.start + work.count + 1, sequence.num_prompt_tokens)
            if sequence.prompt_logprobs >= 0 and stop > work.start + 1:
                targets = sequence.tokens[work.start + 1 : stop].tolist()
                yield PromptRows(work.seq, work.start + 1, tuple(targets), sequence.prompt_logprobs)

    def _logit_rows(
        self, ordered: Sequence[Work], ends: Int64, wanted: Sequence[int], prompts: Sequence[PromptRows]
    ) -> Tensor | None:
        """Return the rows of a step whose logits are needed: int64 [m + p]; None: all rows."""
        if len(wanted) == ends[-1] and not prompts:
            return None
        sampled = [np.arange(ends[i] - 1 - len(ordered[i].drafts), ends[i]) for i in wanted]
        begins = {work.seq: end - work.count for work, end in zip(ordered, ends.tolist(), strict=True)}
        prompt_rows = [np.arange(begins[each.seq], begins[each.seq] + len(each.targets)) for each in prompts]
        found = [*sampled, *prompt_rows]
        return self._tensor(np.concatenate(found).astype(np.int64) if found else ends[:0])

    def _sampling(self, works: Sequence[Work], table_rows: Int64) -> SamplingRows:
        """Return the sampling parameters of the m rows: one after the last known token of each work, and one after each
        of its drafts."""
        rows_each = np.array([1 + len(work.drafts) for work in works], np.int64)
        rows = np.repeat(table_rows, rows_each)
        # The positions of the tokens that will be drawn.
        positions = np.concatenate(
            [np.arange(work.start + work.count - len(work.drafts), work.start + work.count + 1) for work in works]
        )
        edits, first = EditsBuilder(), 0
        for work in works:
            rules = self._sequences[work.seq].rules
            if rules is not None:
                for i in range(1 + len(work.drafts)):
                    edits.add(first + i, rules, work.drafts[:i])
            first += 1 + len(work.drafts)
        return self._sampling_rows(
            rows,
            positions,
            logprobs=max(self._sequences[work.seq].logprobs for work in works),
            edits=edits,
        )

    def _sampling_rows(self, rows: Int64, positions: Int64, *, logprobs: int, edits: EditsBuilder) -> SamplingRows:
        temperature, top_k, top_p, min_p = (
            of_all[rows] for of_all in (self._temperature, self._top_k, self._top_p, self._min_p)
        )
        truncated = (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))
        greedy = not temperature.any()
        keys = np.zeros(len(rows), np.uint64)
        if not greedy:
            keys = row_keys(self._seed[rows], self._sample_index[rows], positions.astype(np.uint64))
        return SamplingRows(
            temperature=self._tensor(temperature),
            top_k=self._tensor(top_k),
            top_p=self._tensor(top_p),
            min_p=self._tensor(min_p),
            keys=split_keys(keys).to(self._device),
            greedy=greedy,
            truncated=np.flatnonzero(truncated).tolist(),
            logprobs=logprobs,
            edits=edits.build(len(rows), self._device),
        )

    def draft_step(self, seqs: Sequence[int], positions: Int64) -> tuple[PagedBatch, SamplingRows]:
        """Return the tensors of a step of the draft model: one token for each of these sequences, at these positions.

        Tokens are drawn without truncation, with the keys that the model will use for the same positions. A position
        that has no block yet, or is beyond the context length, goes to the scratch slot. Drafts after it may then be
        worse, but they are only drafts.
        """
        rows = np.array([self._sequences[seq].row for seq in seqs], np.int64)
        room = np.array([self._sequences[seq].num_blocks for seq in seqs], np.int64) * self._block_size
        beyond = positions >= np.minimum(room, self._max_model_len)
        positions = np.minimum(positions, self._max_model_len - 1)
        batch = self._batch(rows, positions, np.ones(len(rows), np.int64))
        if beyond.any():
            batch.slots[torch.from_numpy(beyond).to(self._device)] = self._scratch_slot
        sampling = self._sampling_rows(rows, positions + 1, logprobs=-1, edits=EditsBuilder())
        return batch, dataclasses.replace(sampling, truncated=())

    def record(self, work: Work, tokens: Sequence[int]) -> None:
        """Remember tokens that were drawn. The next plan may need the last one before the engine knows it."""
        sequence = self._sequences[work.seq]
        self._last_token[sequence.row] = tokens[-1]
        if sequence.rules is not None:
            for token in tokens:
                sequence.rules.append(token)

    def record_plain(self, works: Sequence[Work], tokens: Sequence[int]) -> list[int]:
        """Remember the drawn token of each sequence of a plain step. Return the epochs of the sequences."""
        sequences = [self._sequences[work.seq] for work in works]
        self._last_token[[sequence.row for sequence in sequences]] = tokens
        return [sequence.epoch for sequence in sequences]

    def needs_drawn_token(self, work: Work) -> bool:
        """Return True if a work computes a token that was drawn after the sequence was added."""
        return work.start + work.count - len(work.drafts) > len(self._sequences[work.seq].tokens)

    def set_last_token(self, seq: int, epoch: int, token: int) -> None:
        """Remember the token that the last stage has drawn, unless the sequence has been released since."""
        sequence = self._sequences.get(seq)
        if sequence is not None and sequence.epoch == epoch:
            self._last_token[sequence.row] = token

    def epoch(self, seq: int) -> int:
        return self._sequences[seq].epoch

    def logprobs(self, seq: int) -> int:
        return self._sequences[seq].logprobs

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _split_single_tokens(
    works: Sequence[Work], rows: Int64, starts: Int64, counts: Int64
) -> tuple[Int64, Int64, Int64]:
    """Split works of one token and drafts into works of one token each. rows, starts, counts: [b]."""
    if not any(work.drafts for work in works):
        return rows, starts, counts
    times = np.array([work.count if work.count == 1 + len(work.drafts) else 1 for work in works], np.int64)
    offsets = np.arange(times.sum()) - np.repeat(times.cumsum() - times, times)
    return np.repeat(rows, times), np.repeat(starts, times) + offsets, np.repeat(counts - times + 1, times)


def _masked_rows(planned: Sequence[Work], sampled: Sequence[Work]) -> tuple[int, ...]:
    """Return the rows of a step that have a row in its mask, in the order of the mask, which is that of the plan."""
    if not any(work.masked for work in planned):
        return ()
    first_rows, count = {}, 0
    for work in sampled:
        first_rows[work.seq] = count
        count += 1 + len(work.drafts)
    return tuple(first_rows[work.seq] + i for work in planned if work.masked for i in range(1 + len(work.drafts)))
