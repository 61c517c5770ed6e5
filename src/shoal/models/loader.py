"""From mapped checkpoint files to a rank's own tensors: it reads its slices, and nothing else."""

import mmap
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.models.checkpoint import Checkpoint, TensorEntry
from shoal.models.manifest import Cut, Param, Piece, Shard

_TORCH_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
}
_BY_NAME = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in _TORCH_TYPES.values()}
_DUMMY_PERIOD = (1 << 20) - 3  # made-up weights repeat after so many values; odd, so that rows differ
_WIDENED = 1 << 16  # numbers that are multiplied by their scales at a time
# The number that each byte stands for: to look it up is ten times as fast as PyTorch's conversion.
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Weights(Protocol):
    """A rank's share of each parameter, asked for once each, in manifest order.

    `dtype` is that of parameters without a type of their own.
    """

    dtype: torch.dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor that is read row by row or kept small. May be a view of the file, where nothing is converted."""

    def optional(self, name: str) -> Tensor | None:
        """None where the model, or the rank's stage of it, has no such parameter."""


class CheckpointWeights:
    """Reads weights through private mappings of their files; a page that is only read stays the file's.

    A parameter is copied from the mapping into its final place in one go, slice by slice, whatever has to be
    converted, transposed or put together: nothing is held twice.
    """

    def __init__(self, checkpoint: Checkpoint, params: Iterable[Param], shard: Shard, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._params = {param.name: param for param in shard.held(params)}
        self._shard = shard
        self.dtype = dtype
        self._maps: dict[Path, mmap.mmap] = {}

    def tensor(self, name: str) -> Tensor:
        param = self._params[name]
        dtype = self.dtype if param.dtype is None else _BY_NAME[param.dtype]
        blocks = [block for piece in param.pieces for block in self._blocks(piece)]
        shape = self._shard.param_shape(param)
        if not shape:  # a single number
            return blocks[0].numbers.to(dtype, copy=True)
        if len(blocks) == 1 and blocks[0].numbers.shape == shape and not param.plus:
            entry = self._checkpoint.tensors[param.pieces[0].source]
            if entry.holds(_NAMES[dtype]) and blocks[0].numbers.is_contiguous():
                return blocks[0].numbers
        whole = torch.empty(shape, dtype=dtype)
        row = 0
        for block in blocks:
            rows = block.numbers.shape[: 2 if block.numbers.ndim > whole.ndim else 1].numel()
            block.write(whole[row : row + rows])
            row += rows
        return whole.add_(param.plus) if param.plus else whole

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self._params else None

    def _blocks(self, piece: Piece) -> Iterator["_Block"]:
        """The rank's rows of a piece, in order."""
        entry = self._checkpoint.tensors[piece.source]
        stored = self._map(piece.source, entry)
        if not piece.shape:
            yield _Block(stored)
            return
        matrix = _turned(stored, piece)
        if entry.scales is None:
            yield from map(_Block, self._views(matrix, piece))
            return
        scales = _turned(self._map(f"the scales of {piece.source}", entry.scales.entry).float(), piece)
        rows, columns = (_turned(places, piece) for places in _places(entry.shape, entry.scales.block))
        if piece.transposed:
            rows, columns = columns, rows
        views = (self._views(numbers, piece) for numbers in (matrix, rows, columns))
        for numbers, row, column in zip(*views, strict=True):
            yield _Block(numbers, scales, row, column)

    def _views(self, matrix: Tensor, piece: Piece) -> Iterator[Tensor]:
        """Views of the rank's rows, in order: [rows, ...], or [runs, rows of a run, ...]."""
        rows = range(piece.shape[0])
        if piece.cut is not Cut.WHOLE:
            share = self._shard.ranges[piece.cut]
            if piece.dim == 0:
                rows = share
            else:
                matrix = matrix.narrow(piece.dim, share.start, len(share))
        if piece.run is None or piece.period is None:
            yield matrix.narrow(0, piece.start + rows.start, len(rows))
        else:
            yield from _stripes(matrix, rows, piece.start, piece.run, piece.period)

    def _map(self, name: str, entry: TensorEntry) -> Tensor:
        if entry.dtype not in _TORCH_TYPES:
            raise CheckpointError(
                f"{entry.file}: {name} is stored as {entry.dtype}; supported are {', '.join(_TORCH_TYPES)}"
            )
        if entry.file not in self._maps:
            with entry.file.open("rb") as stream:
                self._maps[entry.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = _TORCH_TYPES[entry.dtype]
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=dtype)
        strides = entry.strides or _row_major(entry.shape)
        reach = 1 + sum((size - 1) * stride for size, stride in zip(entry.shape, strides, strict=True))
        flat = torch.frombuffer(self._maps[entry.file], dtype=dtype, count=reach, offset=entry.offset)
        return flat.as_strided(entry.shape, strides)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows as they are stored, [rows, ...] or [runs, rows of a run, ...]. What is quantized has a matrix of
    scales; a number's is in the row `rows` and the column `columns` says at the number's place. Each of these has the
    shape of `numbers`, and says one thing all along a row, or all along a column."""

    numbers: Tensor
    scales: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def write(self, place: Tensor) -> None:
        """Into a contiguous tensor of as many numbers, widened a part at a time."""
        if self.scales is None or self.rows is None or self.columns is None:
            place.view(self.numbers.shape).copy_(self.numbers)
            return
        if not self.numbers.numel():
            return
        numbers, rows = self.numbers.flatten(0, -2), self.rows[..., 0].flatten()
        columns = self.columns[(0,) * (self.columns.ndim - 1)]
        across = self.scales.index_select(1, columns)
        step = max(1, _WIDENED // numbers.shape[1])
        for first in range(0, len(numbers), step):
            part = slice(first, first + step)
            codes = numbers[part].view(torch.uint8).int().flatten()
            wide = _E4M3.index_select(0, codes).view(-1, numbers.shape[1])
            place[part].copy_(wide.mul_(across.index_select(0, rows[part])))


def _turned(stored: Tensor, piece: Piece) -> Tensor:
    """As rows that a piece can name: a tensor of three dimensions counts as its matrices one below the other."""
    return stored.t() if piece.transposed else stored.flatten(0, 1) if stored.ndim == 3 else stored


def _places(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of each number of a quantized tensor the row and the column of its scale, where the matrices' scales are one
    below the other. Views of the tensor's shape on as many numbers as it has rows, and columns."""
    *before, height, width = shape
    matrices = torch.arange(before[0] if before else 1).unsqueeze(1)
    rows = matrices * -(-height // block[0]) + torch.arange(height) // block[0]
    return rows.view(*before, height, 1).expand(shape), (torch.arange(width) // block[1]).expand(shape)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.Size(shape[i + 1 :]).numel() for i in range(len(shape)))


def _stripes(matrix: Tensor, rows: range, start: int, run: int, period: int) -> Iterator[Tensor]:
    """Views of rows r // run * period + start + r % run: whole runs together, and what is left of one at either end."""
    row = rows.start
    while row < rows.stop:
        number, within = divmod(row, run)
        whole = (rows.stop - row) // run
        if within == 0 and whole:
            first = matrix.storage_offset() + (number * period + start) * matrix.stride(0)
            yield matrix.as_strided(
                (whole, run, *matrix.shape[1:]), (period * matrix.stride(0), *matrix.stride()), first
            )
            row += whole * run
        else:
            count = min(run - within, rows.stop - row)
            yield matrix.narrow(0, number * period + start + within, count)
            row += count


class DummyWeights:
    """Made-up weights of the right shapes, small enough that activations stay finite."""

    def __init__(self, params: Iterable[Param], shard: Shard, dtype: torch.dtype, seed: int) -> None:
        self._params = {param.name: param for param in shard.held(params)}
        self._shard = shard
        self.dtype = dtype
        noise = torch.randn(_DUMMY_PERIOD, generator=torch.Generator().manual_seed(seed))
        self._noise = (noise * 0.02).to(dtype)

    def tensor(self, name: str) -> Tensor:
        param = self._params[name]
        dtype = self.dtype if param.dtype is None else _BY_NAME[param.dtype]
        shape = self._shard.param_shape(param)
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype)
        whole = torch.empty(shape, dtype=dtype)
        flat, start = whole.view(-1), zlib.crc32(name.encode()) % _DUMMY_PERIOD
        position = 0
        while position < len(flat):
            part = self._noise[start : start + len(flat) - position]
            flat[position : position + len(part)] = part
            position, start = position + len(part), 0
        return whole

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self._params else None
