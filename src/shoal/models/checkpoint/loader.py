"""Loading a rank's share of the weights: each rank reads only its own slices of the checkpoint's files."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.kernels.linear_weights import LinearWeights
from shoal.kernels.quantized import quantize_weight
from shoal.kernels.weight_format import WeightFormat
from shoal.models.checkpoint.checkpoint import Checkpoint, TensorEntry
from shoal.models.checkpoint.stored_file import StoredFile, split_into_reads
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
_DUMMY_PERIOD = (1 << 20) - 3  # dummy weights repeat after this many values; odd, so that rows differ
_WIDENED_NUMBERS = 1 << 16  # numbers that are multiplied by their scales at a time
_READ_BYTES = 1 << 22  # bytes that are read at a time if they must be converted before they get to their place
# The number that each byte stands for. Looking it up is ten times as fast as PyTorch's conversion.
_E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Weights(Protocol):
    """The source of a rank's weights. Each parameter is asked for once, in the order of the manifest."""

    dtype: torch.dtype  # of parameters without a type of their own

    def tensor(self, name: str) -> Tensor:
        """Return the rank's share of a parameter, [rows, ...], in memory of its own."""

    def linear(self, name: str, device: torch.device) -> Tensor | LinearWeights:
        """Return the rank's share of the weight of a linear layer on a device, in the format of the manifest.

        Weights that are quantized here are those of a rank's own slice: a scale counts no numbers of other ranks, and
        groups of inputs begin with the first input of the slice.
        """

    def optional(self, name: str) -> Tensor | None:
        """Return the rank's share, or None if the model, or the rank's stage of it, has no such parameter."""


class CheckpointWeights:
    """Weights that are read from a checkpoint into memory; later changes of the files do not affect them.

    A parameter is read slice by slice into its final place, even if it must be converted, transposed or assembled from
    several tensors, so that no second copy is in memory.
    """

    def __init__(self, checkpoint: Checkpoint, params: Iterable[Param], shard: Shard, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._params = {param.name: param for param in shard.held(params)}
        self._shard = shard
        self.dtype = dtype
        self._buffer = bytearray(_READ_BYTES)
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

    def linear(self, name: str, device: torch.device) -> Tensor | LinearWeights:
        return _in_format(self.tensor(name), self._shard.format_of(self._params[name]), device)

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self._params else None

    def _open(self, file: Path) -> StoredFile:
        return StoredFile(file, self._checkpoint.files.get(file), self._buffer)

    def _blocks(self, piece: Piece, file: StoredFile) -> Iterator["_Block"]:
        """Yield the rank's rows of a piece, in order."""
        entry = self._checkpoint.tensors[piece.source]
        stored = self._stored(piece.source, entry)
        if not piece.shape:
            yield _Block(file, entry.offset, stored)
            return
        matrix = _as_matrix(stored, piece)
        if matrix is None:  # its matrices are not stored one after the other
            whole = torch.empty(stored.shape, dtype=stored.dtype)
            matrix = _as_matrix(_Block(file, entry.offset, stored).write(whole), piece)
            assert matrix is not None
        if entry.scales is None:
            yield from (_Block(file, entry.offset, numbers) for numbers in self._views(matrix, piece))
            return
        scales = self._scales(piece, entry.scales.entry)
        places = (_as_matrix(each, piece) for each in _scale_indices(entry.shape, entry.scales.block))
        rows, columns = (each for each in places if each is not None)
        if piece.transposed:
            rows, columns = columns, rows
        views = (self._views(numbers, piece) for numbers in (matrix, rows, columns))
        for numbers, row, column in zip(*views, strict=True):
            yield _Block(file, entry.offset, numbers, scales, row, column)

    def _stored(self, name: str, entry: TensorEntry) -> Tensor:
        """Return a tensor as it is stored: without numbers, or with them if only PyTorch can read its file.

        Raises:
            CheckpointError: tensors of its type can't be loaded.
        """
        stored = _stored(name, entry)
        if entry.loaded_as is None:
            return stored
        if self._loaded is None or self._loaded[0] != entry.file:
            self._loaded = None  # frees the memory before the next file is loaded
            self._loaded = entry.file, load_tensors(entry.file)
        return self._loaded[1][entry.loaded_as]

    def _scales(self, piece: Piece, entry: TensorEntry) -> Tensor:
        stored = self._stored(f"the scales of {piece.source}", entry)
        with self._open(entry.file) as file:
            read = _Block(file, entry.offset, stored).write(torch.empty(stored.shape))
        matrix = _as_matrix(read, piece)
        assert matrix is not None
        return matrix

    def _views(self, matrix: Tensor, piece: Piece) -> Iterator[Tensor]:
        """Yield views of the rank's rows, in order: [rows, ...], or [runs, rows of a run, ...]."""
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


def _in_format(whole: Tensor, kept_in: WeightFormat | None, device: torch.device) -> Tensor | LinearWeights:
    """Return a weight in a format, or on the device as it is."""
    return whole.to(device) if kept_in is None else quantize_weight(whole, kept_in)


def _stored(name: str, entry: TensorEntry) -> Tensor:
    """Return a tensor with the shape and strides of one in a file, on PyTorch's device `meta`, so without numbers.

    Views of it show where in the file their numbers are.

    Raises:
        CheckpointError: tensors of its type can't be loaded.
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
    """Some rows of a stored tensor, and their scales if they are quantized.

    `numbers` is [rows, ...] or [runs, rows of a run, ...]. It is a view of a `_stored` tensor whose data begin at
    `offset` in the file, or it has numbers that were read before. Element (i, j) of a quantized tensor is multiplied by
    scales[scale_rows[i, j], scale_columns[i, j]]. `scale_rows` is the same along each row, `scale_columns` along each
    column, and both have the shape of `numbers`.
    """

    file: StoredFile
    offset: int
    numbers: Tensor
    scales: Tensor | None = None
    scale_rows: Tensor | None = None
    scale_columns: Tensor | None = None

    def write(self, target: Tensor) -> Tensor:
        """Read the rows into a tensor of the same shape, converting them part by part, and return that tensor."""
        if self.scales is not None:
            for part in self._parts(_WIDENED_NUMBERS):
                target[part].copy_(self._widen(part))
        elif self.numbers.is_meta and self._has_layout_of(target):
            flat = target.view(-1).view(torch.uint8)
            self.file.read_into(flat.numpy().data, self._position(self.numbers))
        else:
            for part in self._parts(_READ_BYTES // self.numbers.itemsize):
                target[part].copy_(self._read(part))
        return target

    def _parts(self, limit: int) -> Iterator[tuple[slice, ...]]:
        return split_into_reads(self.numbers.shape, self.numbers.stride(), limit)

    def _has_layout_of(self, target: Tensor) -> bool:
        return self.numbers.dtype == target.dtype and self.numbers.is_contiguous() and target.is_contiguous()

    def _widen(self, part: tuple[slice, ...]) -> Tensor:
        """Read a part of a quantized tensor and multiply it by its scales, in float32."""
        assert self.scales is not None
        assert self.scale_rows is not None
        assert self.scale_columns is not None
        numbers = self._read(part)
        width = numbers.shape[-1]
        codes = numbers.contiguous().view(torch.uint8).int().flatten()
        rows, columns = self.scale_rows[part][..., 0].flatten(), self.scale_columns[part][(0,) * (numbers.ndim - 1)]
        scales = self.scales.index_select(0, rows).index_select(1, columns)
        return _E4M3.index_select(0, codes).view(-1, width).mul_(scales).view(numbers.shape)

    def _read(self, part: tuple[slice, ...]) -> Tensor:
        """Return a part of the numbers, which is valid until the next call."""
        view = self.numbers[part]
        if not view.is_meta:
            return view
        reach = 1 + sum((n - 1) * stride for n, stride in zip(view.shape, view.stride(), strict=True))
        data = self.file.read(reach * view.itemsize, self._position(view))
        return torch.frombuffer(data, dtype=view.dtype).as_strided(view.shape, view.stride())

    def _position(self, view: Tensor) -> int:
        return self.offset + int(view.storage_offset()) * view.itemsize


def _as_matrix(stored: Tensor, piece: Piece) -> Tensor | None:
    """Return a view of a stored tensor as the matrix whose rows `piece` names.

    A tensor of three dimensions counts as its matrices one below the other; None if no view can show it so.
    """
    if piece.transposed or stored.ndim != 3:
        return stored.t() if piece.transposed else stored
    try:
        return stored.view(-1, stored.shape[2]) if stored.is_meta else stored.flatten(0, 1)
    except RuntimeError:  # raised by PyTorch if there is no such view
        return None


def _scale_indices(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return, for each number of a quantized tensor, the row and the column of its scale.

    The scales count as one matrix, with those of one matrix below those of the other. Both results are views with the
    shape of the tensor, of as many numbers as it has rows or columns.
    """
    *before, height, width = shape
    matrices = torch.arange(before[0] if before else 1).unsqueeze(1)
    rows = matrices * -(-height // block[0]) + torch.arange(height) // block[0]
    return rows.view(*before, height, 1).expand(shape), (torch.arange(width) // block[1]).expand(shape)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.Size(shape[i + 1 :]).numel() for i in range(len(shape)))


def _stripes(matrix: Tensor, rows: range, start: int, run: int, period: int) -> Iterator[Tensor]:
    """Yield views of the rows r // run * period + start + r % run of a matrix, for r in `rows`.

    All complete runs are one view; an incomplete run at either end is another one.
    """
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
    """Random weights of the right shapes (`--load-format dummy`), small enough that activations stay finite."""

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

    def linear(self, name: str, device: torch.device) -> Tensor | LinearWeights:
        return _in_format(self.tensor(name), self._shard.format_of(self._params[name]), device)

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self._params else None
