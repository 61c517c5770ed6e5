"""The tensors of decoding steps, which one call of C++ writes into memory that stays."""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shoal.kernels.base import PagedBatch
from shoal.kernels.native import load_native_library
from shoal.native_library import bind


class DecodeKind(IntEnum):
    """The kinds of steps with one token for each sequence (`Kind` in `csrc/decode_batch.cpp`)."""

    OTHER = 0  # some compute a given token, or have sampling rules or log-probabilities
    GREEDY = 1
    DRAWN = 2  # some are not greedy


class DecodeBuffers:
    """The tensors of steps in which every sequence computes one token, on the host. Recorded steps read from them."""

    def __init__(self, max_tokens: int, max_blocks: int, block_size: int) -> None:
        """`max_tokens`: of a step. `max_blocks`: of a sequence."""
        self.max_tokens = max_tokens
        self.max_blocks = max_blocks
        self.block_size = block_size
        self.tokens = torch.zeros(max_tokens, dtype=torch.int64)
        self.positions = torch.zeros(max_tokens, dtype=torch.int64)
        self.slots = torch.zeros(max_tokens, dtype=torch.int64)
        self.query_starts = torch.arange(max_tokens + 1, dtype=torch.int32)
        self.context_lens = torch.ones(max_tokens, dtype=torch.int32)
        self.block_tables = torch.zeros((max_tokens, max_blocks), dtype=torch.int32)
        self._firsts: dict[int, tuple[Tensor, PagedBatch]] = {}

    def first(self, count: int) -> tuple[Tensor, PagedBatch]:
        """Return the tokens and the batch of a step of `count` tokens. The next step of any size overwrites them.

        The batch has no context lengths on the host, which kernels in C++ do not read.
        """
        found = self._firsts.get(count)
        if found is None:
            batch = PagedBatch(
                positions=self.positions[:count],
                slots=self.slots[:count],
                query_starts=self.query_starts[: count + 1],
                context_lens=self.context_lens[:count],
                block_tables=self.block_tables[:count],
                block_size=self.block_size,
                num_single=count,
                query_lens=(1,) * count,
                host_context_lens=(),
            )
            found = self._firsts[count] = self.tokens[:count], batch
        return found

    def step(self, positions: Sequence[int], device: torch.device) -> tuple[Tensor, PagedBatch]:
        """Return the tokens and the batch of a step that was written, on a device: a copy unless that is the host.

        `positions`: those of the step's tokens, which are still known on the host.
        """
        tokens, first = self.first(len(positions))
        batch = PagedBatch(
            positions=first.positions.to(device),
            slots=first.slots.to(device),
            query_starts=first.query_starts.to(device),
            context_lens=first.context_lens.to(device),
            block_tables=first.block_tables[:, : max(positions) // self.block_size + 1].to(device),
            block_size=self.block_size,
            num_single=first.num_single,
            query_lens=first.query_lens,
            host_context_lens=tuple(position + 1 for position in positions),
        )
        return tokens.to(device), batch


class _Table(ctypes.Structure):
    """`DecodeTable` in `csrc/decode_batch.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("blocks", "written", "last_token", "num_given", "plain", "temperature")),
        *((name, ctypes.c_int64) for name in ("max_blocks", "block_size", "scratch_slot")),
        *((name, ctypes.c_void_p) for name in ("tokens", "positions", "slots", "context_lens", "block_tables")),
    )


class DecodeBatches:
    """Writes the tensors of decoding steps from the arrays of a table of sequences."""

    def __init__(self, write: Any, buffers: DecodeBuffers, scratch_slot: int, **rows: npt.NDArray[Any]) -> None:
        """Take the arrays, which C++ reads at each step: they must be contiguous and stay where they are.

        Args:
            write: the function of C++.
            rows: the arrays with a row for each sequence, named as in C++.
        """
        self._write = write
        self._kept = rows, buffers  # C++ reads and writes their memory
        tensors = ("tokens", "positions", "slots", "context_lens", "block_tables")
        self._table = _Table(
            **{name: array.ctypes.data for name, array in rows.items()},
            **{name: getattr(buffers, name).data_ptr() for name in tensors},
            max_blocks=buffers.max_blocks,
            block_size=buffers.block_size,
            scratch_slot=scratch_slot,
        )
        self._rows = np.zeros(buffers.max_tokens, np.int64)
        self._positions = np.zeros(buffers.max_tokens, np.int64)
        self._arguments = ctypes.byref(self._table), self._rows.ctypes.data, self._positions.ctypes.data

    def write(self, rows: Sequence[int], positions: Sequence[int]) -> DecodeKind:
        """Write the tensors of a step into the buffers, unless it is of the kind OTHER.

        Args:
            rows: those of the sequences in the arrays.
            positions: those of their tokens.
        """
        count = len(rows)
        self._rows[:count] = rows
        self._positions[:count] = positions
        return DecodeKind(self._write(*self._arguments, count))


def decode_batches(buffers: DecodeBuffers, scratch_slot: int, **rows: npt.NDArray[Any]) -> DecodeBatches | None:
    """Return a writer of the tensors of decoding steps (see `DecodeBatches`), or None without the native library."""
    library, _ = load_native_library()
    if library is None:
        return None
    arguments = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    write = bind(library, "shoal_decode_batch", arguments, ctypes.c_int32)
    return DecodeBatches(write, buffers, scratch_slot, **rows)
