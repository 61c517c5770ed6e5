"""The memory of the paged KV cache of one rank: for every layer, slots for keys and values."""

import ctypes
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.base import KVCache
from shoal.kernels.kv_rows import KV_DTYPES, SCALE_DTYPE
from shoal.models.kv_format import KV_FORMATS
from shoal.models.manifest import Shard
from shoal.models.spec import ModelSpec

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class KVMemory:
    """The memory of a KV cache."""

    layers: list[KVCache]
    pool: Tensor  # uint8 [bytes]: the memory of all layers together

    def resident_bytes(self) -> int:
        """Return how many bytes are in physical memory. On a CPU a page is there after it was first written."""
        if self.pool.is_cuda or not len(self.pool):
            return self.pool.nbytes
        pages = torch.empty(-(-self.pool.nbytes // mmap.PAGESIZE), dtype=torch.uint8)
        where, size, found = (self.pool.data_ptr(), self.pool.nbytes, pages.data_ptr())
        if _libc.mincore(ctypes.c_void_p(where), ctypes.c_size_t(size), ctypes.c_void_p(found)):
            return size
        return int((pages & 1).sum()) * mmap.PAGESIZE


def allocate(
    spec: ModelSpec, shard: Shard, num_blocks: int, block_size: int, kv_dtype: str, device: torch.device
) -> KVMemory:
    """Allocate the KV cache of a shard, filled with zeros.

    kv_dtype: a name of `KV_FORMATS`.

    It must not contain NaNs, which even a weight of zero would not remove from an attention output. After the blocks
    there is one more slot, for keys and values that are never read. Latents are keys and values at the same time.
    """
    layers, slots = len(shard.stage.layers), num_blocks * block_size + 1
    rows = torch.Size((layers, spec.cached_per_token, slots, len(shard.heads.kv_ids)))
    dtype, scale_bytes = KV_DTYPES[kv_dtype], KV_FORMATS[kv_dtype].scale_bytes
    size = rows.numel() * spec.head_dim * dtype.itemsize
    first_scale = size + size % max(scale_bytes, 1)
    pool = _zeros(first_scale + rows.numel() * scale_bytes, device)
    numbers = [tuple(layer) for layer in pool[:size].view(dtype).view(*rows, spec.head_dim)]
    if not scale_bytes:
        return KVMemory([KVCache(parts[0], parts[-1]) for parts in numbers], pool)
    scales = [tuple(layer) for layer in pool[first_scale:].view(SCALE_DTYPE).view(rows)]
    caches = [KVCache(parts[0], parts[-1], own[0], own[-1]) for parts, own in zip(numbers, scales, strict=True)]
    return KVMemory(caches, pool)


def _zeros(count: int, device: torch.device) -> Tensor:
    """Return zeros as uint8 [count]. On a CPU they are mapped from the kernel, which adds large pages on first use."""
    if device.type != "cpu" or count == 0:
        return torch.zeros(count, dtype=torch.uint8, device=device)
    mapping = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)
