"""The sequences a rank remembers, and the tensors of a step built from them.

A plan says only what is new. The table knows each sequence's blocks, its last token and its sampling parameters, in
arrays with a row a sequence, so that most of a step is built by indexing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal import wire
from shoal.kernels.base import PagedBatch
from shoal.worker.random import row_keys, split_keys
from shoal.worker.sampler import SamplingRows

_COLDEST = 1e-5  # below, logits divided by it leave float32's range, and the likeliest token is the only one left

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Sequence:
    row: int
    epoch: int
    tokens: Int32  # as given; what is sampled later is remembered in the table's last_token alone
    num_blocks: int
    logprobs: int


@dataclass(frozen=True, slots=True)
class StepInput:
    tokens: Tensor  # int64 [n]
    batch: PagedBatch
    logit_rows: Tensor | None  # int64 [m], None: every token is sampled
    sampled: tuple[wire.Work, ...]  # the works of these rows, in their order
    sampling: SamplingRows | None  # None: nothing is sampled


class SequenceTable:
    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._sequences: dict[int, _Sequence] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._blocks: Int32 = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._last_token: Int64 = np.zeros(max_num_seqs, np.int64)
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._sample_index = np.zeros(max_num_seqs, np.uint64)

    def __len__(self) -> int:
        return len(self._sequences)

    def apply(self, plan: wire.StepPlan) -> None:
        """Forgets, admits and appends blocks, as the plan says."""
        for seq in plan.released:
            self._free_rows.append(self._sequences.pop(seq).row)
        for new in plan.new:
            self._admit(new)
        for work in plan.work:
            if work.blocks:
                self._append_blocks(self._sequences[work.seq], work.blocks)

    def _admit(self, new: wire.NewSeq) -> None:
        row = self._free_rows.pop()
        sampling = new.sampling
        sequence = _Sequence(row, new.epoch, np.frombuffer(new.tokens, "<i4"), 0, sampling.logprobs)
        self._sequences[new.seq] = sequence
        self._blocks[row] = 0
        self._append_blocks(sequence, new.blocks)
        self._temperature[row] = sampling.temperature if sampling.temperature >= _COLDEST else 0.0
        self._top_k[row] = sampling.top_k
        self._top_p[row] = sampling.top_p
        self._seed[row] = sampling.seed
        self._sample_index[row] = sampling.sample_index

    def _append_blocks(self, sequence: _Sequence, blocks: wire.Ids) -> None:
        end = sequence.num_blocks + len(blocks)
        self._blocks[sequence.row, sequence.num_blocks : end] = blocks
        sequence.num_blocks = end

    def build(self, works: Sequence[wire.Work]) -> StepInput:
        """The tensors of a step. Sequences with one token come first: the kernels take those together."""
        ordered = sorted(works, key=lambda work: work.count != 1)  # stable: the plan's order otherwise
        num_single = sum(work.count == 1 for work in ordered)
        rows = np.array([self._sequences[work.seq].row for work in ordered], np.int64)
        starts = np.array([work.start for work in ordered], np.int64)
        counts = np.array([work.count for work in ordered], np.int64)
        contexts = starts + counts
        ends = counts.cumsum()

        owner = np.repeat(np.arange(len(ordered)), counts)
        positions = np.arange(len(owner)) + np.repeat(starts - ends + counts, counts)
        tables = self._blocks[rows, : -(-int(contexts.max()) // self._block_size)]
        slots = tables[owner, positions // self._block_size] * np.int64(self._block_size) + positions % self._block_size
        tokens = np.repeat(self._last_token[rows], counts)
        for work, end in zip(ordered, ends, strict=True):
            given = self._sequences[work.seq].tokens
            if work.start < len(given):
                tokens[end - work.count : end] = given[work.start : work.start + work.count]

        batch = PagedBatch(
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            query_starts=self._tensor(np.concatenate([[0], ends]).astype(np.int32)),
            context_lens=self._tensor(contexts.astype(np.int32)),
            block_tables=self._tensor(tables),
            block_size=self._block_size,
            num_single=num_single,
            query_lens=tuple(counts.tolist()),
            host_context_lens=tuple(contexts.tolist()),
        )
        wanted = [i for i, work in enumerate(ordered) if work.sample]
        every = len(wanted) == len(owner)
        return StepInput(
            tokens=self._tensor(tokens),
            batch=batch,
            logit_rows=None if every else self._tensor(ends[wanted] - 1),
            sampled=tuple(ordered[i] for i in wanted),
            sampling=self._sampling([ordered[i].seq for i in wanted], rows[wanted], contexts[wanted])
            if wanted
            else None,
        )

    def _sampling(self, seqs: Sequence[int], rows: Int64, positions: Int64) -> SamplingRows:
        """`positions` are those of the tokens to come."""
        temperature, top_k, top_p = self._temperature[rows], self._top_k[rows], self._top_p[rows]
        truncated = (temperature > 0) & ((top_k > 0) | (top_p < 1))
        greedy = not temperature.any()
        keys = np.zeros(len(rows), np.uint64)
        if not greedy:
            keys = row_keys(self._seed[rows], self._sample_index[rows], positions.astype(np.uint64))
        return SamplingRows(
            temperature=self._tensor(temperature),
            top_k=self._tensor(top_k),
            top_p=self._tensor(top_p),
            keys=split_keys(keys).to(self._device),
            greedy=greedy,
            truncated=np.flatnonzero(truncated).tolist(),
            logprobs=max(self._sequences[seq].logprobs for seq in seqs),
        )

    def record(self, works: Sequence[wire.Work], tokens: Sequence[int]) -> None:
        """Remembers what was sampled: the next plan may ask for it before the engine has seen it."""
        for work, token in zip(works, tokens, strict=True):
            self._last_token[self._sequences[work.seq].row] = token

    def epoch(self, seq: int) -> int:
        return self._sequences[seq].epoch

    def logprobs(self, seq: int) -> int:
        return self._sequences[seq].logprobs

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
