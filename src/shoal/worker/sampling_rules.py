"""The sampling rules of sequences: which edits of logits their parameters ask for.

Only sequences with such parameters have rules. The history of a sequence grows token by token, so the cost of a step
does not depend on the length of the text.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.wire.ranks import Sampling, SamplingPenalties
from shoal.wire.tokens import TOKEN_DTYPE
from shoal.worker.logit_edits import Bias, Edits, Masks, Pairs, Penalties

_LARGEST_REPETITION = 1e30  # with larger factors, or with less than its inverse, products leave the range of float32

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Tokens = Sequence[int] | Int32


class History:
    """The different tokens of a prompt and its output, and how many times the output has each."""

    def __init__(self, prompt: Tokens, output: Sequence[int]) -> None:
        known = np.unique(np.asarray(prompt, np.int64))
        self._indices = {token: index for index, token in enumerate(known.tolist())}
        self._ids = np.concatenate([known, np.zeros(len(known) + 64, np.int64)])
        self._counts = np.zeros(len(self._ids), np.int32)
        for token in output:
            self.append(token)

    def append(self, token: int) -> None:
        index = self._indices.setdefault(token, len(self._indices))
        if index == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[index] = token
        self._counts[index] += 1

    def after(self, drafts: Sequence[int]) -> tuple[Int64, Int32]:
        """Return the tokens and their counts as they would be if these drafts were part of the output."""
        ids, counts = self._ids[: len(self._indices)], self._counts[: len(self._indices)]
        if not drafts:
            return ids, counts
        counts, new = counts.copy(), dict[int, int]()
        for token in drafts:
            if token in self._indices:
                counts[self._indices[token]] += 1
            else:
                new[token] = new.get(token, 0) + 1
        return (
            np.concatenate([ids, np.array(list(new), np.int64)]),
            np.concatenate([counts, np.array(list(new.values()), np.int32)]),
        )


class SamplingRules:
    """Per-sequence sampling rules and the state they need."""

    def __init__(self, sampling: Sampling, prompt: Tokens, output: Tokens) -> None:
        drawn: list[int] = np.asarray(output, np.int64).tolist()
        self.sampling = sampling
        self.bias_ids = _ids(sampling.bias_ids)
        self.bias_values = np.frombuffer(sampling.bias_values, "<f4")
        self.allowed = None if sampling.allowed is None else _bits(_ids(sampling.allowed))
        self.history = History(prompt, drawn) if sampling.penalties is not None else None
        self._generated = len(output)
        # Most forbidden tokens are the same at every step, so their array is made once.
        always = [run[0] for run in sampling.banned if len(run) == 1]
        self._always = np.array(always, np.int64)
        self._always_and_ends = np.concatenate([_ids(sampling.ends), self._always])
        # Banned runs of several tokens, by their last but one token: (the tokens before that one, the last token).
        self._runs: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for *before, token, last in (run for run in sampling.banned if len(run) > 1):
            self._runs.setdefault(token, []).append((tuple(before), last))
        # The last tokens of the output: one less than the longest banned run has.
        self._tail = deque(drawn, max((len(banned) for banned in sampling.banned), default=1) - 1)

    @classmethod
    def of(cls, sampling: Sampling, prompt: Tokens, output: Tokens) -> "SamplingRules | None":
        """Return the rules for some sampling parameters; None if these parameters change no logits."""
        plain = not (sampling.bias_ids or sampling.banned or sampling.min_tokens or sampling.penalties)
        return None if plain and sampling.allowed is None else cls(sampling, prompt, output)

    def append(self, token: int) -> None:
        self._generated += 1
        self._tail.append(token)
        if self.history is not None:
            self.history.append(token)

    def forbidden(self, drafts: Sequence[int]) -> Int64:
        """Return the tokens that must not follow these drafts.

        They are the ends of the output before it has `min_tokens` tokens, and the last tokens of banned runs. The array
        must not be changed; a token may be in it twice.
        """
        early = self._generated + len(drafts) < self.sampling.min_tokens
        found = self._always_and_ends if early else self._always
        lasts = self._completing_runs(drafts) if self._runs else []
        return np.concatenate([found, np.array(lasts, np.int64)]) if lasts else found

    def _completing_runs(self, drafts: Sequence[int]) -> list[int]:
        """Return the tokens that would complete a banned run of several tokens after these drafts."""
        text = (*self._tail, *drafts)
        runs = self._runs.get(text[-1], ()) if text else ()
        before = text[:-1]
        return [last for run, last in runs if not run or before[-len(run) :] == run]


class EditsBuilder:
    """A builder of the edits of a step, from the rules of its rows."""

    def __init__(self) -> None:
        self._allowed: list[tuple[int, Int32]] = []
        self._forbidden: list[tuple[int, Int64]] = []
        self._bias: list[tuple[int, Int64]] = []
        self._bias_values: list[npt.NDArray[np.float32]] = []
        self._seen: list[tuple[int, Int64]] = []
        self._seen_counts: list[Int32] = []
        self._penalties: list[tuple[int, SamplingPenalties]] = []

    def add(self, row: int, rules: SamplingRules, drafts: Sequence[int]) -> None:
        """Add the edits of one row, in which a token is drawn after the sequence's tokens and these drafts."""
        if rules.allowed is not None:
            self._allowed.append((row, rules.allowed))
        forbidden = rules.forbidden(drafts)
        if len(forbidden):
            self._forbidden.append((row, forbidden))
        if len(rules.bias_ids):
            self._bias.append((row, rules.bias_ids))
            self._bias_values.append(rules.bias_values)
        if rules.history is not None and rules.sampling.penalties is not None:
            ids, counts = rules.history.after(drafts)
            self._seen.append((row, ids))
            self._seen_counts.append(counts)
            self._penalties.append((row, rules.sampling.penalties))

    def build(self, num_rows: int, device: torch.device) -> Edits | None:
        if not (self._allowed or self._forbidden or self._bias or self._seen):
            return None
        return Edits(
            allowed=self._build_allowed(device) if self._allowed else None,
            forbidden=Pairs(*_flat(self._forbidden, device)) if self._forbidden else None,
            bias=Bias(*_flat(self._bias, device), _tensor(np.concatenate(self._bias_values), device))
            if self._bias
            else None,
            penalties=self._build_penalties(num_rows, device) if self._seen else None,
        )

    def _build_allowed(self, device: torch.device) -> Masks:
        bits = np.zeros((len(self._allowed), max(len(bits) for _, bits in self._allowed)), np.int32)
        for i, (_, own) in enumerate(self._allowed):
            bits[i, : len(own)] = own
        rows = np.array([row for row, _ in self._allowed], np.int64)
        return Masks(_tensor(rows, device), _tensor(bits, device))

    def _build_penalties(self, num_rows: int, device: torch.device) -> Penalties:
        by_row = np.tile(np.array([[0.0], [0.0], [1.0]], np.float32), num_rows)
        for row, penalties in self._penalties:
            factor = min(max(penalties.repetition, 1 / _LARGEST_REPETITION), _LARGEST_REPETITION)
            by_row[:, row] = penalties.presence, penalties.frequency, factor
        presence, frequency, repetition = (_tensor(values, device) for values in by_row)
        counts = _tensor(np.concatenate(self._seen_counts), device)
        return Penalties(*_flat(self._seen, device), counts, presence, frequency, repetition)


def _ids(data: bytes) -> Int64:
    return np.frombuffer(data, TOKEN_DTYPE).astype(np.int64)


def _bits(ids: Int64) -> Int32:
    """Return token ids as the bits of a row of `Masks`. They are made once, because there may be very many ids."""
    flags = np.zeros((int(ids.max(initial=0)) // 32 + 1) * 32, bool)
    flags[ids] = True
    return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32)


def _flat(pairs: Sequence[tuple[int, Int64]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows and the ids of pairs of a row and several ids, each as int64 [k]."""
    rows = np.repeat([row for row, _ in pairs], [len(ids) for _, ids in pairs])
    return _tensor(rows, device), _tensor(np.concatenate([ids for _, ids in pairs]), device)


def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
