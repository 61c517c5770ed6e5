"""The kernels of the sampler: each reads rows of logits and returns a few numbers a row, without a copy of the row.

There are two implementations: PyTorch for any device, and C++ on the CPU (`csrc/sampling.cpp`). Their
comparisons, order and counts are the same, bit by bit. The random bits of the noise are the same on every device, and
both implementations let PyTorch compute its logarithms. So draws differ only if the two best scores are closer than
the rounding error of a logarithm: about one in a million between devices. Sums of exponentials (`logsumexp`) agree to
a few units in the last place, since the implementations add in different orders; a row's sum has the same bits in any
batch.

Tokens are ordered by descending logit, equal logits by ascending id. This order is total: so the top tokens of the
vocabulary are the top tokens among the top tokens of its shares.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.kernels.gumbel_noise import gumbel
from shoal.native_library import open_library

ABI_VERSION = 3

_MINUS_INF = float("-inf")
_LARGEST_ID = 0x7FFFFFFF


class SamplingKernels(Protocol):
    """The operations of the sampler.

    logits: float32 [m, columns], for `argmax` also bfloat16; column c is the token `start` + c. rows: int64 [r], the
    rows of `logits` to work on. Limits are packed tokens (see `pack_tokens`), int64 [r]: only tokens larger than its
    limit count in a row.
    """

    def apply_masks(self, logits: Tensor, start: int, rows: Tensor, bits: Tensor) -> None:
        """Set the logits of tokens that are not allowed to -inf, in place.

        bits: int32 [r, words]; bit i of word w allows the token 32 * w + i, and tokens beyond the last word are not
        allowed. A row occurs at most once in `rows`.
        """

    def top(self, logits: Tensor, start: int, rows: Tensor, count: int) -> Tensor:
        """Return the likeliest `count` tokens of each row, packed, in descending order.

        Gives int64 [r, min(count, columns)].
        """

    def argmax(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Return the likeliest token of every row: logits, float32 [m], and ids, int64 [m].

        Needs at least one column.
        """

    def logsumexp(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, floor: Tensor, limits: Tensor | None = None
    ) -> Tensor:
        """Return log(sum(exp(logit / temperature))) over the tokens whose logit / temperature is at least `floor`.

        temperature and floor: float32 [r]; the temperature is above 0. Gives float32 [r], -inf for a sum of nothing.
        """

    def count_above(self, logits: Tensor, values: Tensor) -> Tensor:
        """Return how many logits of each row are larger than the row's value. values: float32 [m]. Gives int64 [m]."""

    def draw(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, keys: Tensor, limits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the token of each row with the largest logit / temperature + Gumbel noise; the lowest id if equal.

        temperature: float32 [r], above 0; keys: int32 [r, 2], of the noise. Needs at least one column. Gives scores,
        float32 [r], and ids, int64 [r]; a score of -inf means that no token could be drawn.
        """


def pack_tokens(values: Tensor, ids: Tensor) -> Tensor:
    """Pack each logit and token id into one integer; integers compare as tokens do: larger ones come first.

    values: float32; ids: int64 below 2^31, of the same shape. Gives int64: the upper half encodes the logit, the lower
    half the id.
    """
    bits = (values + 0.0).view(torch.int32)  # turns -0.0 into 0.0, which is equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (ordered.long() << 32) | (_LARGEST_ID - ids)


def unpack_tokens(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, float32, and ids, int64, of packed tokens."""
    ordered = (packed >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), _LARGEST_ID - (packed & 0xFFFFFFFF)


# A limit below every token that can be drawn.
NO_LIMIT = int(pack_tokens(torch.tensor(_MINUS_INF), torch.tensor(_LARGEST_ID)))


class TorchSampling:
    def apply_masks(self, logits: Tensor, start: int, rows: Tensor, bits: Tensor) -> None:
        columns = logits.shape[1]
        ids = torch.arange(start, start + columns, device=logits.device)
        words = ids >> 5
        known = words < bits.shape[1]
        if bits.shape[1] == 0:
            logits[rows] = _MINUS_INF
            return
        word = bits[:, words.clamp(max=bits.shape[1] - 1)]
        allowed = ((word >> (ids & 31).int()) & 1).bool() & known
        logits[rows] = logits[rows].masked_fill(~allowed, _MINUS_INF)

    def top(self, logits: Tensor, start: int, rows: Tensor, count: int) -> Tensor:
        ids = torch.arange(start, start + logits.shape[1], device=logits.device)
        return pack_tokens(logits[rows], ids).topk(min(count, logits.shape[1]), dim=1).values

    def argmax(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        value, column = logits.max(1)
        return value.float(), column + start

    def logsumexp(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, floor: Tensor, limits: Tensor | None = None
    ) -> Tensor:
        if logits.shape[1] == 0:
            return logits.new_full((len(rows),), _MINUS_INF)
        scaled = _within_limits(logits[rows], start, limits) / temperature.unsqueeze(1)
        return scaled.masked_fill_(scaled < floor.unsqueeze(1), _MINUS_INF).logsumexp(1)

    def count_above(self, logits: Tensor, values: Tensor) -> Tensor:
        return (logits > values.unsqueeze(1)).sum(1)

    def draw(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, keys: Tensor, limits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        ids = torch.arange(start, start + logits.shape[1], dtype=torch.int32, device=logits.device)
        scaled = _within_limits(logits[rows], start, limits) / temperature.unsqueeze(1)
        score, column = scaled.add_(gumbel(keys, ids)).max(1)
        return score, column + start


def _within_limits(logits: Tensor, start: int, limits: Tensor | None) -> Tensor:
    """Set the logits of tokens that are not larger than their row's limit to -inf: [r, columns]."""
    if limits is None:
        return logits
    ids = torch.arange(start, start + logits.shape[1], device=logits.device)
    return logits.masked_fill(pack_tokens(logits, ids) <= limits.unsqueeze(1), _MINUS_INF)


class NativeSampling:
    """The kernels in C++ for the CPU; `load_native` makes one. Threads may share it."""

    # The most tokens of a row that C++ may leave to choose from. There is usually one, or two with nearly equal scores;
    # a row with more is drawn by PyTorch.
    _MAX_CANDIDATES = 16

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)  # the library keeps this object, but makes a new one for `library[name]`
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

    def top(self, logits: Tensor, start: int, rows: Tensor, count: int) -> Tensor:
        _check(logits)
        rows = rows.contiguous()
        count = min(count, logits.shape[1])
        out = rows.new_empty((len(rows), count))
        if out.numel():
            threads = min(torch.get_num_threads(), len(rows))
            scratch = rows.new_empty(threads * self._library.shoal_first_scratch(logits.shape[1]))
            self._library.shoal_first(*_rows(logits, rows), start, count, scratch.data_ptr(), out.data_ptr(), threads)
        return out

    def argmax(self, logits: Tensor, start: int) -> tuple[Tensor, Tensor]:
        (rows, columns), threads = logits.shape, torch.get_num_threads()
        parts = min(max(threads // max(rows, 1), 1), columns)
        values, ids = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
        scratch = ids if parts == 1 else torch.empty(parts * rows, dtype=torch.int64)
        self._library.shoal_argmax(
            *(_TYPE_CODES[logits.dtype], logits.data_ptr(), logits.stride(0)),
            *(rows, columns, start, parts),
            *(scratch.data_ptr(), values.data_ptr(), ids.data_ptr(), threads),
        )
        return values, ids

    def logsumexp(
        self, logits: Tensor, start: int, rows: Tensor, temperature: Tensor, floor: Tensor, limits: Tensor | None = None
    ) -> Tensor:
        _check(logits)
        rows, temperature, floor = rows.contiguous(), temperature.contiguous(), floor.contiguous()
        limits = _contiguous_limits(rows, limits)
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
        limits = _contiguous_limits(rows, limits)
        columns = rows.new_zeros((len(rows), self._MAX_CANDIDATES))
        counts = rows.new_empty(len(rows))
        self._library.shoal_draw(
            *_rows(logits, rows),
            start,
            temperature.data_ptr(),
            keys.data_ptr(),
            limits.data_ptr(),
            self._MAX_CANDIDATES,
            columns.data_ptr(),
            counts.data_ptr(),
            torch.get_num_threads(),
        )
        columns = columns[:, : max(1, int(counts.max()))]
        unused = torch.arange(columns.shape[1]) >= counts.unsqueeze(1)
        scores = (logits[rows.unsqueeze(1), columns] / temperature.unsqueeze(1)).add_(
            gumbel(keys, (columns + start).int())
        )
        score, best = scores.masked_fill_(unused, _MINUS_INF).max(1)
        ids = columns.gather(1, best.unsqueeze(1)).squeeze(1) + start
        undecided = (counts < 0).nonzero().squeeze(1)
        if len(undecided):
            score[undecided], ids[undecided] = self._torch.draw(
                logits, start, rows[undecided], temperature[undecided], keys[undecided], limits[undecided]
            )
        return score, ids


_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
_INT, _LONG, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
_ROWS = [_POINTER, _LONG, _POINTER, _LONG, _LONG]
_SIGNATURES: dict[str, list[Any]] = {
    "shoal_apply_masks": [*_ROWS, _LONG, _POINTER, _LONG, _LONG],
    "shoal_first": [*_ROWS, _LONG, _LONG, _POINTER, _POINTER, _LONG],
    "shoal_argmax": [_INT, _POINTER, *[_LONG] * 5, *[_POINTER] * 3, _LONG],
    "shoal_log_totals": [*_ROWS, _LONG, *[_POINTER] * 4, _LONG],
    "shoal_count_above": [_POINTER, *[_LONG] * 3, *[_POINTER] * 2, _LONG],
    "shoal_draw": [*_ROWS, _LONG, *[_POINTER] * 3, _LONG, *[_POINTER] * 2, _LONG],
}


def _check(logits: Tensor) -> None:
    if logits.dtype != torch.float32 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(f"logits must be float32 with contiguous rows, got {logits.dtype}, strides {logits.stride()}")


def _rows(logits: Tensor, rows: Tensor) -> tuple[int, int, int, int, int]:
    """Return the arguments that describe the logits and the rows to work on."""
    return logits.data_ptr(), logits.stride(0), rows.data_ptr(), len(rows), logits.shape[1]


def _contiguous_limits(rows: Tensor, limits: Tensor | None) -> Tensor:
    return rows.new_full((len(rows),), NO_LIMIT) if limits is None else limits.contiguous()


def load_native() -> tuple[NativeSampling | None, str]:
    """Return the kernels in C++, or None, and one line that names the loaded library or says why there is none."""
    library, reason = open_library(Path(__file__).parent, "_sampling", "shoal_sampling_abi_version", ABI_VERSION)
    return (None if library is None else NativeSampling(library)), reason


@cache
def _on_cpu() -> SamplingKernels:
    native, _ = load_native()
    return native or TorchSampling()


_TORCH = TorchSampling()


def sampling_kernels(logits: Tensor) -> SamplingKernels:
    """Return the kernels for the device, dtype and strides of these logits."""
    contiguous_rows = logits.shape[1] <= 1 or logits.stride(1) == 1
    native = logits.device.type == "cpu" and logits.dtype in _TYPE_CODES and contiguous_rows
    return _on_cpu() if native else _TORCH
