"""From checkpoint files to a rank's own tensors: it reads its slices, and nothing else."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.models.checkpoint.checkpoint import Checkpoint, TensorEntry
from shoal.models.checkpoint.stored_file import StoredFile, parts
from shoal.models.checkpoint.torch_files import load_tensors
from shoal.models.manifest import Cut, Param, Piece, Shard

_TORCH_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
}
_BY_NAME = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DUMMY_PERIOD = (1 << 20) - 3  # made-up weights repeat after so many values; odd, so that rows differ
_WIDENED = 1 << 16  # numbers that are multiplied by their scales at a time
_PART = 1 << 22  # bytes that are read at a time, where they can't go straight to their place
# The number that each byte stands for: to look it up is ten times as fast as PyTorch's conversion.
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Weights(Protocol):
    """A rank's share of each parameter, asked for once each, in manifest order.

    `dtype` is that of parameters without a type of their own.
    """

    dtype: torch.dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor of the rank's own, [rows, ...]."""

    def optional(self, name: str) -> Tensor | None:
        """None where the model, or the rank's stage of it, has no such parameter."""


class CheckpointWeights:
    """Reads a rank's share of weights into memory of its own: what happens to the files later changes nothing.

    A parameter is read into its final place in one go, slice by slice, whatever has to be converted, transposed or put
    together: nothing is held twice.
    """

    def __init__(self, checkpoint: Checkpoint, params: Iterable[Param], shard: Shard, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._params = {param.name: param for param in shard.held(params)}
        self._shard = shard
        self.dtype = dtype
        self._buffer = bytearray(_PART)
        self._loaded: tuple[Path, dict[str, Tensor]] | None = None  # the file that was last loaded as a whole

    def tensor(self, name: str) -> Tensor:
        param = self._params[name]
        dtype = self.dtype if param.dtype is None else _BY_NAME[param.dtype]
        whole = torch.empty(self._shard.param_shape(param), dtype=dtype)
        row = 0
        for piece in param.pieces:
            with self._open(self._checkpoint.tensors[piece.source].file) as file:
                for block in self._blocks(piece, file):
                    numbers = block.numbers
                    if not whole.shape:  # a single number
                        return block.write(torch.empty(numbers.shape, dtype=dtype))
                    rows = numbers.shape[: 2 if numbers.ndim > whole.ndim else 1].numel()
                    block.write(whole[row : row + rows].view(numbers.shape))
                    row += rows
        return whole.add_(param.plus) if param.plus else whole

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self._params else None

    def _open(self, file: Path) -> StoredFile:
        return StoredFile(file, self._checkpoint.files.get(file), self._buffer)

    def _blocks(self, piece: Piece, file: StoredFile) -> Iterator["_Block"]:
        """The rank's rows of a piece, in order."""
        entry = self._checkpoint.tensors[piece.source]
        stored = self._stored(piece.source, entry)
        if not piece.shape:
            yield _Block(file, entry.offset, stored)
            return
        matrix = _turned(stored, piece)
        if matrix is None:  # its matrices do not lie one below the other
            whole = torch.empty(stored.shape, dtype=stored.dtype)
            matrix = _turned(_Block(file, entry.offset, stored).write(whole), piece)
            assert matrix is not None
        if entry.scales is None:
            yield from (_Block(file, entry.offset, numbers) for numbers in self._views(matrix, piece))
            return
        scales = self._scales(piece, entry.scales.entry)
        places = (_turned(each, piece) for each in _places(entry.shape, entry.scales.block))
        rows, columns = (each for each in places if each is not None)
        if piece.transposed:
            rows, columns = columns, rows
        views = (self._views(numbers, piece) for numbers in (matrix, rows, columns))
        for numbers, row, column in zip(*views, strict=True):
            yield _Block(file, entry.offset, numbers, scales, row, column)

    def _stored(self, name: str, entry: TensorEntry) -> Tensor:
        """A tensor as it lies in its file, or in memory if only PyTorch can read the file.

        Raises:
            CheckpointError: it has a type that can't be loaded.
        """
        stored = _stored(name, entry)
        if entry.loaded_as is None:
            return stored
        if self._loaded is None or self._loaded[0] != entry.file:
            self._loaded = None  # before the next one is loaded: they may be large
            self._loaded = entry.file, load_tensors(entry.file)
        return self._loaded[1][entry.loaded_as]

    def _scales(self, piece: Piece, entry: TensorEntry) -> Tensor:
        stored = self._stored(f"the scales of {piece.source}", entry)
        with self._open(entry.file) as file:
            read = _Block(file, entry.offset, stored).write(torch.empty(stored.shape))
        turned = _turned(read, piece)
        assert turned is not None
        return turned

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


def _stored(name: str, entry: TensorEntry) -> Tensor:
    """A tensor as it lies in its file. It has no numbers (PyTorch's device `meta`): views of it say where a part lies.

    Raises:
        CheckpointError: it has a type that can't be loaded.
    """
    if entry.dtype not in _TORCH_TYPES:
        raise CheckpointError(
            f"{entry.file}: {name} is stored as {entry.dtype}; supported are {', '.join(_TORCH_TYPES)}"
        )
    strides = entry.strides or _row_major(entry.shape)
    reach = 0 if 0 in entry.shape else 1 + sum((n - 1) * stride for n, stride in zip(entry.shape, strides, strict=True))
    flat = torch.empty(reach, dtype=_TORCH_TYPES[entry.dtype], device="meta")
    return flat.as_strided(entry.shape, strides) if reach else flat.view(entry.shape)


@dataclass(frozen=True, slots=True)
class _Block:
    """Some rows as they are stored, [rows, ...] or [runs, rows of a run, ...]: a view of what `_stored` gives, whose
    data begin `offset` bytes into the file, or numbers that were read before. What is quantized has a matrix of scales;
    a number's is in the row `rows` and the column `columns` says at the number's place. Each of these has the shape of
    `numbers`, and says one thing all along a row, or all along a column."""

    file: StoredFile
    offset: int
    numbers: Tensor
    scales: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def write(self, place: Tensor) -> Tensor:
        """Into a tensor of the same shape, converted a part at a time, and gives that."""
        if self.scales is not None:
            for part in self._parts(_WIDENED):
                place[part].copy_(self._widened(part))
        elif self.numbers.is_meta and self._lies_as(place):
            flat = place.view(-1).view(torch.uint8)
            self.file.read_into(flat.numpy().data, self._position(self.numbers))
        else:
            for part in self._parts(_PART // self.numbers.itemsize):
                place[part].copy_(self._read(part))
        return place

    def _parts(self, most: int) -> Iterator[tuple[slice, ...]]:
        return parts(self.numbers.shape, self.numbers.stride(), most)

    def _lies_as(self, place: Tensor) -> bool:
        return self.numbers.dtype == place.dtype and self.numbers.is_contiguous() and place.is_contiguous()

    def _widened(self, part: tuple[slice, ...]) -> Tensor:
        assert self.scales is not None
        assert self.rows is not None
        assert self.columns is not None
        numbers = self._read(part)
        width = numbers.shape[-1]
        codes = numbers.contiguous().view(torch.uint8).int().flatten()
        rows, columns = self.rows[part][..., 0].flatten(), self.columns[part][(0,) * (numbers.ndim - 1)]
        scales = self.scales.index_select(0, rows).index_select(1, columns)
        return _E4M3.index_select(0, codes).view(-1, width).mul_(scales).view(numbers.shape)

    def _read(self, part: tuple[slice, ...]) -> Tensor:
        """Valid until the next one is read."""
        view = self.numbers[part]
        if not view.is_meta:
            return view
        reach = 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.stride(), strict=True))
        data = self.file.read(reach * view.itemsize, self._position(view))
        return torch.frombuffer(data, dtype=view.dtype).as_strided(view.shape, view.stride())

    def _position(self, view: Tensor) -> int:
        return self.offset + int(view.storage_offset()) * view.itemsize


def _turned(stored: Tensor, piece: Piece) -> Tensor | None:
    """As rows that a piece can name: a tensor of three dimensions counts as its matrices one below the other. None
    where they don't lie so in a file."""
    if piece.transposed or stored.ndim != 3:
        return stored.t() if piece.transposed else stored
    try:
        return stored.view(-1, stored.shape[2]) if stored.is_meta else stored.flatten(0, 1)
    except RuntimeError:  # PyTorch's way to say that
        return None


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
