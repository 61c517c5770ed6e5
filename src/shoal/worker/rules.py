"""What a sequence's own parameters do to its logits, and the history that some of them look at.

Only sequences that ask for any of it have rules. A history grows token by token, so that a step costs what it
changes, whatever the length of the text.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.wire.ranks import Sampling, SamplingPenalties
from shoal.wire.tokens import TOKEN_DTYPE
from shoal.worker.edits import Bias, Edits, Masks, Pairs, Penalties

_LARGEST_REPETITION = 1e30  # beyond, and below its inverse, products leave float32's range

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Tokens = Sequence[int] | Int32


class History:
    """Each token of prompt and output once, and how often the output has it."""

    def __init__(self, prompt: Tokens, output: Sequence[int]) -> None:
        known = np.unique(np.asarray(prompt, np.int64))
        self._places = {token: place for place, token in enumerate(known.tolist())}
        self._ids = np.concatenate([known, np.zeros(len(known) + 64, np.int64)])
        self._counts = np.zeros(len(self._ids), np.int32)
        for token in output:
            self.append(token)

    def append(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1

    def behind(self, guesses: Sequence[int]) -> tuple[Int64, Int32]:
        """Tokens and counts as they would be if the output went on like this."""
        ids, counts = self._ids[: len(self._places)], self._counts[: len(self._places)]
        if not guesses:
            return ids, counts
        counts, new = counts.copy(), dict[int, int]()
        for token in guesses:
            if token in self._places:
                counts[self._places[token]] += 1
            else:
                new[token] = new.get(token, 0) + 1
        return (
            np.concatenate([ids, np.array(list(new), np.int64)]),
            np.concatenate([counts, np.array(list(new.values()), np.int32)]),
        )


class Rules:
    """Per-sequence sampling rules and the state they need."""

    def __init__(self, sampling: Sampling, prompt: Tokens, output: Tokens) -> None:
        drawn: list[int] = np.asarray(output, np.int64).tolist()
        self.sampling = sampling
        self.bias_ids = _ids(sampling.bias_ids)
        self.bias_values = np.frombuffer(sampling.bias_values, "<f4")
        self.allowed = None if sampling.allowed is None else _bits(_ids(sampling.allowed))
        self.history = History(prompt, drawn) if sampling.penalties is not None else None
        self._generated = len(output)
        # Most of what is never drawn is the same at every step, so it is put together once.
        always = [run[0] for run in sampling.banned if len(run) == 1]
        self._always = np.array(always, np.int64)
        self._always_and_ends = np.concatenate([_ids(sampling.ends), self._always])
        # Longer runs by the token before their last: (what stands before that one, the last).
        self._runs: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for *before, token, last in (run for run in sampling.banned if len(run) > 1):
            self._runs.setdefault(token, []).append((tuple(before), last))
        # As many of the output's last tokens as the longest run that must not be completed.
        self._tail = deque(drawn, max((len(banned) for banned in sampling.banned), default=1) - 1)

    @classmethod
    def of(cls, sampling: Sampling, prompt: Tokens, output: Tokens) -> "Rules | None":
        """None where the parameters change no logits."""
        plain = not (sampling.bias_ids or sampling.banned or sampling.min_tokens or sampling.penalties)
        return None if plain and sampling.allowed is None else cls(sampling, prompt, output)

    def append(self, token: int) -> None:
        self._generated += 1
        self._tail.append(token)
        if self.history is not None:
            self.history.append(token)

    def never(self, guesses: Sequence[int]) -> Int64:
        """What must not follow these guesses: ends that come too early, and the last tokens of banned runs.

        Returns:
            Token ids, perhaps one of them twice; to be read only.
        """
        early = self._generated + len(guesses) < self.sampling.min_tokens
        found = self._always_and_ends if early else self._always
        lasts = self._completing(guesses) if self._runs else []
        return np.concatenate([found, np.array(lasts, np.int64)]) if lasts else found

    def _completing(self, guesses: Sequence[int]) -> list[int]:
        """What would complete a banned run of several tokens."""
        text = (*self._tail, *guesses)
        runs = self._runs.get(text[-1], ()) if text else ()
        before = text[:-1]
        return [last for run, last in runs if not run or before[-len(run) :] == run]


class EditsBuilder:
    """Collects the rules of a step's rows into flat pairs."""

    def __init__(self) -> None:
        self._allowed: list[tuple[int, Int32]] = []
        self._never: list[tuple[int, Int64]] = []
        self._bias: list[tuple[int, Int64]] = []
        self._bias_values: list[npt.NDArray[np.float32]] = []
        self._seen: list[tuple[int, Int64]] = []
        self._seen_counts: list[Int32] = []
        self._penalties: list[tuple[int, SamplingPenalties]] = []

    def add(self, row: int, rules: Rules, guesses: Sequence[int]) -> None:
        """One row: what is drawn there follows the sequence's tokens and these guesses."""
        if rules.allowed is not None:
            self._allowed.append((row, rules.allowed))
        never = rules.never(guesses)
        if len(never):
            self._never.append((row, never))
        if len(rules.bias_ids):
            self._bias.append((row, rules.bias_ids))
            self._bias_values.append(rules.bias_values)
        if rules.history is not None and rules.sampling.penalties is not None:
            ids, counts = rules.history.behind(guesses)
            self._seen.append((row, ids))
            self._seen_counts.append(counts)
            self._penalties.append((row, rules.sampling.penalties))

    def build(self, num_rows: int, device: torch.device) -> Edits | None:
        if not (self._allowed or self._never or self._bias or self._seen):
            return None
        return Edits(
            allowed=self._build_allowed(device) if self._allowed else None,
            never=Pairs(*_flat(self._never, device)) if self._never else None,
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
    """As `Masks` has them: made once, since all ids of a vocabulary are too many to be looked at in every step."""
    flags = np.zeros((int(ids.max(initial=0)) // 32 + 1) * 32, bool)
    flags[ids] = True
    return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32)


def _flat(pairs: Sequence[tuple[int, Int64]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and ids, one beside the other."""
    rows = np.repeat([row for row, _ in pairs], [len(ids) for _, ids in pairs])
    return _tensor(rows, device), _tensor(np.concatenate([ids for _, ids in pairs]), device)


def _tensor(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
