"""From mapped checkpoint files to a rank's own tensors: it reads its slices, and nothing else."""

import mmap
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.models.checkpoint import Checkpoint, TensorEntry
from shoal.models.manifest import Cut, Param, Piece, Shard

_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_DUMMY_PERIOD = (1 << 20) - 3  # made-up weights repeat after so many values; odd, so that rows differ


class Weights(Protocol):
    """A rank's share of each parameter, asked for once each, in manifest order."""

    def tensor(self, name: str) -> Tensor:
        """A tensor that is read row by row or kept small. May be a view of the file, where nothing is converted."""

    def optional(self, name: str) -> Tensor | None:
        """None where the model has no such parameter."""


class CheckpointWeights:
    """Reads safetensors through private mappings; a page that is only read stays the file's."""

    def __init__(self, checkpoint: Checkpoint, params: Iterable[Param], shard: Shard, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._params = {param.name: param for param in params}
        self._shard = shard
        self._dtype = dtype
        self._maps: dict[Path, mmap.mmap] = {}

    def tensor(self, name: str) -> Tensor:
        pieces = [self._piece(piece) for piece in self._params[name].pieces]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self._params else None

    def _piece(self, piece: Piece) -> Tensor:
        whole = self._map(piece.source, self._checkpoint.tensors[piece.source])
        if piece.cut is not Cut.WHOLE:
            share = self._shard.ranges[piece.cut]
            whole = whole.narrow(piece.dim, share.start, len(share))
        return whole.to(self._dtype).contiguous()

    def _map(self, name: str, entry: TensorEntry) -> Tensor:
        if entry.dtype not in _TORCH_TYPES:
            raise CheckpointError(
                f"{entry.file}: {name} is stored as {entry.dtype}; supported are {', '.join(_TORCH_TYPES)}"
            )
        if entry.file not in self._maps:
            with entry.file.open("rb") as stream:
                self._maps[entry.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        dtype = _TORCH_TYPES[entry.dtype]
        count = torch.Size(entry.shape).numel()
        if count == 0:
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(self._maps[entry.file], dtype=dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)


class DummyWeights:
    """Made-up weights of the right shapes, small enough that activations stay finite."""

    def __init__(self, params: Iterable[Param], shard: Shard, dtype: torch.dtype, seed: int) -> None:
        self._params = {param.name: param for param in params}
        self._shard = shard
        self._dtype = dtype
        noise = torch.randn(_DUMMY_PERIOD, generator=torch.Generator().manual_seed(seed))
        self._noise = (noise * 0.02).to(dtype)

    def tensor(self, name: str) -> Tensor:
        shape = self._shard.param_shape(self._params[name])
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype)
        count = torch.Size(shape).numel()
        start = zlib.crc32(name.encode()) % _DUMMY_PERIOD
        repeated = self._noise.roll(-start).repeat(-(-count // _DUMMY_PERIOD))
        return repeated[:count].view(shape).clone()

    def optional(self, name: str) -> Tensor | None:
        return self.tensor(name) if name in self._params else None
