"""What sampling needs of a row of logits without writing one: its first tokens, its sum, its best draw.

Two implementations: PyTorch on any device, and C++ for float32 on the CPU (`csrc/sampling.cpp`). What is compared,
ordered or counted is the same in both, bit by bit. Noise has the same random bits everywhere, and its logarithms are
PyTorch's in both, so draws differ only where the two best scores are within a rounding of a logarithm of each other:
about one in a million between devices. Sums of exponentials (`log_totals`) agree to a few units of the last place, as
sums in different orders do, and give a row the same bits whatever else is in the batch.

Tokens are ordered by falling logit, equals by rising id; this order is total, so that the first ones of the vocabulary
are the first ones of its shares' first ones.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.kernels.library import open_library
from shoal.kernels.noise import gumbel

ABI_VERSION = 1

_NEVER = float("-inf")
_LARGEST_ID = 0x7FFFFFFF


class SamplingKernels(Protocol):
    """`logits` are float32 [m, columns], the tokens being `start` + column; `rows` int64 [r] are the rows meant."""

    def apply_masks(self, logits: Tensor, start: int, rows: Tensor, bits: Tensor) -> None:
        """Sets to -inf, in place, what is not allowed. bits: int32 [r, words], bit i of word w being that of the token
        32 * w + i; tokens beyond the last word are not allowed. No row occurs twice."""

    def first(self, logits: Tensor, start: int, rows: Tensor, count: int) -> Tensor:
        """The first `count` tokens of each row as ranks (see `ranks_of`), falling: int64 [r, min(count, columns)]."""

    def best(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The first token of every row: logits float32 [m], ids int64 [m]. There is at least one column."""

    def log_totals(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, floor: Tensor, limits: Tensor | None = None
    ) -> Tensor:
        """The logarithm of the sum of exp(logit / temperature) over the tokens whose logit / temperature is at least
        `floor`. temperature and floor: float32 [r], the temperature above 0. limits: int64 [r], ranks: only tokens
        ahead of them. Float32 [r], -inf for nothing."""

    def count_above(self, logits: Tensor, values: Tensor) -> Tensor:
        """How many logits of each row are larger than the row's value, float32 [m]. Int64 [m]."""

    def draw(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, keys: Tensor, limits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of each row the token with the largest logit / temperature + Gumbel noise, the lowest id where several have
        it: scores float32 [r], ids int64 [r]. temperature: float32 [r], above 0; keys: int32 [r, 2]; limits: int64 [r],
        ranks: only tokens ahead of them. There is at least one column; a score of -inf says that nothing was drawn."""


def ranks_of(values: Tensor, ids: Tensor) -> Tensor:
    """Integers in the order of tokens, larger ones first: float32 values and int64 ids of one shape, the ids below
    2^31. Int64, of which the upper half stands for the value and the lower one for the id."""
    bits = (values + 0.0).view(torch.int32)  # turns -0.0 into 0.0, which is equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (ordered.long() << 32) | (_LARGEST_ID - ids)


def of_ranks(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The values, float32, and ids, int64, that ranks stand for."""
    ordered = (ranks >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), _LARGEST_ID - (ranks & 0xFFFFFFFF)


# The rank of a token that every one with a chance is ahead of.
BEHIND_ALL = int(ranks_of(torch.tensor(_NEVER), torch.tensor(_LARGEST_ID)))


class TorchSampling:
    def apply_masks(self, logits: Tensor, start: int, rows: Tensor, bits: Tensor) -> None:
        columns = logits.shape[1]
        ids = torch.arange(start, start + columns, device=logits.device)
        words = ids >> 5
        known = words < bits.shape[1]
        if bits.shape[1] == 0:
            logits[rows] = _NEVER
            return
        word = bits[:, words.clamp(max=bits.shape[1] - 1)]
        allowed = ((word >> (ids & 31).int()) & 1).bool() & known
        logits[rows] = logits[rows].masked_fill(~allowed, _NEVER)

    def first(self, logits: Tensor, start: int, rows: Tensor, count: int) -> Tensor:
        ids = torch.arange(start, start + logits.shape[1], device=logits.device)
        return ranks_of(logits[rows], ids).topk(min(count, logits.shape[1]), dim=1).values

    def best(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        value, column = logits.max(1)
        return value, column + start

    def log_totals(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, floor: Tensor, limits: Tensor | None = None
    ) -> Tensor:
        if logits.shape[1] == 0:
            return logits.new_full((len(rows),), _NEVER)
        scaled = _ahead(logits[rows], start, limits) / temperature.unsqueeze(1)
        return scaled.masked_fill_(scaled < floor.unsqueeze(1), _NEVER).logsumexp(1)

    def count_above(self, logits: Tensor, values: Tensor) -> Tensor:
        return (logits > values.unsqueeze(1)).sum(1)

    def draw(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, keys: Tensor, limits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        ids = torch.arange(start, start + logits.shape[1], dtype=torch.int32, device=logits.device)
        scaled = _ahead(logits[rows], start, limits) / temperature.unsqueeze(1)
        score, column = scaled.add_(gumbel(keys, ids)).max(1)
        return score, column + start


def _ahead(logits: Tensor, start: int, limits: Tensor | None) -> Tensor:
    """[r, columns], -inf where a token is not ahead of its row's limit."""
    if limits is None:
        return logits
    ids = torch.arange(start, start + logits.shape[1], device=logits.device)
    return logits.masked_fill(ranks_of(logits, ids) <= limits.unsqueeze(1), _NEVER)


class NativeSampling:
    """In C++, on the CPU; `load_native` makes one. Threads may share it."""

    _CAPACITY = (
        16  # tokens a draw is left with: one, or two that are about as good; where there are more, PyTorch draws
    )

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)  # what the attribute gives is kept by the library, `library[name]` is not
            function.argtypes, function.restype = arguments, None
        library.shoal_first_scratch.argtypes = [_LONG]
        library.shoal_first_scratch.restype = _LONG
        self._library = library
        self._torch = TorchSampling()

    def apply_masks(self, logits: Tensor, start: int, rows: Tensor, bits: Tensor) -> None:
        _check(logits)
        rows, bits = rows.contiguous(), bits.contiguous()
        self._library.shoal_apply_masks(
            *_rows(logits, rows), start, bits.data_ptr(), bits.shape[1], torch.get_num_threads()
        )

    def first(self, logits: Tensor, start: int, rows: Tensor, count: int) -> Tensor:
        _check(logits)
        rows = rows.contiguous()
        count = min(count, logits.shape[1])
        out = rows.new_empty((len(rows), count))
        if out.numel():
            threads = min(torch.get_num_threads(), len(rows))
            scratch = rows.new_empty(threads * self._library.shoal_first_scratch(logits.shape[1]))
            self._library.shoal_first(*_rows(logits, rows), start, count, scratch.data_ptr(), out.data_ptr(), threads)
        return out

    def best(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        values, ids = of_ranks(self.first(logits, start, torch.arange(len(logits)), 1))
        return values.squeeze(1), ids.squeeze(1)

    def log_totals(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, floor: Tensor, limits: Tensor | None = None
    ) -> Tensor:
        _check(logits)
        rows, temperature, floor = rows.contiguous(), temperature.contiguous(), floor.contiguous()
        limits = _limits(rows, limits)
        out = logits.new_empty(len(rows))
        self._library.shoal_log_totals(
            *_rows(logits, rows),
            start,
            temperature.data_ptr(),
            floor.data_ptr(),
            limits.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def count_above(self, logits: Tensor, values: Tensor) -> Tensor:
        _check(logits)
        values = values.contiguous()
        out = torch.empty(len(logits), dtype=torch.int64)
        self._library.shoal_count_above(
            logits.data_ptr(),
            logits.stride(0),
            *logits.shape,
            values.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def draw(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, keys: Tensor, limits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _check(logits)
        rows, temperature, keys = rows.contiguous(), temperature.contiguous(), keys.contiguous()
        limits = _limits(rows, limits)
        columns = rows.new_zeros((len(rows), self._CAPACITY))
        counts = rows.new_empty(len(rows))
        self._library.shoal_draw(
            *_rows(logits, rows),
            start,
            temperature.data_ptr(),
            keys.data_ptr(),
            limits.data_ptr(),
            self._CAPACITY,
            columns.data_ptr(),
            counts.data_ptr(),
            torch.get_num_threads(),
        )
        columns = columns[:, : max(1, int(counts.max()))]
        unused = torch.arange(columns.shape[1]) >= counts.unsqueeze(1)
        scores = (logits[rows.unsqueeze(1), columns] / temperature.unsqueeze(1)).add_(
            gumbel(keys, (columns + start).int())
        )
        score, best = scores.masked_fill_(unused, _NEVER).max(1)
        ids = columns.gather(1, best.unsqueeze(1)).squeeze(1) + start
        left = (counts < 0).nonzero().squeeze(1)
        if len(left):
            score[left], ids[left] = self._torch.draw(
                logits, start, rows[left], temperature[left], keys[left], limits[left]
            )
        return score, ids


_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p
_ROWS = [_POINTER, _LONG, _POINTER, _LONG, _LONG]
_SIGNATURES: dict[str, list[Any]] = {
    "shoal_apply_masks": [*_ROWS, _LONG, _POINTER, _LONG, _LONG],
    "shoal_first": [*_ROWS, _LONG, _LONG, _POINTER, _POINTER, _LONG],
    "shoal_log_totals": [*_ROWS, _LONG, *[_POINTER] * 4, _LONG],
    "shoal_count_above": [_POINTER, *[_LONG] * 3, *[_POINTER] * 2, _LONG],
    "shoal_draw": [*_ROWS, _LONG, *[_POINTER] * 3, _LONG, *[_POINTER] * 2, _LONG],
}


def _check(logits: Tensor) -> None:
    if logits.dtype != torch.float32 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(f"logits must be float32 with rows in one piece, got {logits.dtype}, {logits.stride()}")


def _rows(logits: Tensor, rows: Tensor) -> tuple[int, int, int, int, int]:
    """The arguments that say which rows of which logits."""
    return logits.data_ptr(), logits.stride(0), rows.data_ptr(), len(rows), logits.shape[1]


def _limits(rows: Tensor, limits: Tensor | None) -> Tensor:
    return rows.new_full((len(rows),), BEHIND_ALL) if limits is None else limits.contiguous()


def load_native() -> tuple[NativeSampling | None, str]:
    """The kernels in C++, or None, and one line that says which library was loaded or why there is none."""
    library, reason = open_library(Path(__file__).parent, "_sampling", "shoal_sampling_abi_version", ABI_VERSION)
    return (None if library is None else NativeSampling(library)), reason


@cache
def _on_cpu() -> SamplingKernels:
    native, _ = load_native()
    return native or TorchSampling()


_TORCH = TorchSampling()


def sampling_kernels(logits: Tensor) -> SamplingKernels:
    """What serves these logits."""
    in_rows = logits.shape[1] <= 1 or logits.stride(1) == 1
    native = logits.device.type == "cpu" and logits.dtype == torch.float32 and in_rows
    return _on_cpu() if native else _TORCH
