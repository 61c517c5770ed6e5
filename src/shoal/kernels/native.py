"""The kernels in C++ for the CPU (`csrc/kernels.cpp`), called through ctypes.

A row's result has the same bits whatever else is in the batch and however many threads compute it, for all operations
and for the attention of sequences with at most `MAX_SHORT_QUERIES` queries. Longer runs go through PyTorch.
"""

import ctypes
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.kernels.base import HeadLayout, KVCache, PagedBatch, QKNorm, Rope
from shoal.kernels.reference import ReferenceKernels, attend_runs

ABI_VERSION = 1
MAX_SHORT_QUERIES = 8  # beyond, the matrix products of a prefill beat rereading the keys from cache for every query

_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
_OUT_OF_MEMORY = 1

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "shoal_rms_norm": [_INT, *[_POINTER] * 3, _LONG, _LONG, _FLOAT, _LONG],
    "shoal_add_rms_norm": [_INT, *[_POINTER] * 3, _LONG, _LONG, _FLOAT, _LONG],
    "shoal_silu_mul": [_INT, *[_POINTER] * 2, _LONG, _LONG, _LONG],
    "shoal_rotate_and_store": [_INT, *[_POINTER] * 10, *[_LONG] * 5, _FLOAT, _LONG],
    "shoal_attend": [_INT, *[_POINTER] * 7, *[_LONG] * 7, _POINTER, _FLOAT, _LONG],
}


class NativeKernels:
    """`shoal.kernels.base.Kernels` on the CPU, for float32 and bfloat16; `load_native` makes one.

    Threads may share one object. All tensors of a call have one dtype, the rotary tables aside.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._rms_norm = _function(library, "shoal_rms_norm")
        self._add_rms_norm = _function(library, "shoal_add_rms_norm")
        self._silu_mul = _function(library, "shoal_silu_mul")
        self._rotate_and_store = _function(library, "shoal_rotate_and_store")
        self._attend = _function(library, "shoal_attend", restype=_INT)
        self._max_head_dim = int(library.shoal_max_head_dim())
        self._groups: dict[tuple[tuple[int, ...], int], ctypes.Array[ctypes.c_int32]] = {}
        self._reference = ReferenceKernels()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        rows, size = x.shape
        self._rms_norm(
            _TYPE_CODES[x.dtype], x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, size, eps, _threads()
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        rows, size = x.shape
        self._add_rms_norm(
            _TYPE_CODES[x.dtype], x.data_ptr(), residual.data_ptr(), weight.data_ptr(), rows, size, eps, _threads()
        )
        return x, residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, size))
        self._silu_mul(_TYPE_CODES[gate_up.dtype], gate_up.data_ptr(), out.data_ptr(), rows, size, _threads())
        return out

    def rotate_and_store(
        self, qkv: Tensor, heads: HeadLayout, norm: QKNorm | None, rope: Rope, batch: PagedBatch, cache: KVCache
    ) -> Tensor:
        qkv = qkv.contiguous()
        rows = qkv.shape[0]
        out = qkv.new_empty((rows, heads.q_heads, heads.head_dim))
        self._rotate_and_store(
            _TYPE_CODES[qkv.dtype],
            qkv.data_ptr(),
            None if norm is None else norm.q_weight.data_ptr(),
            None if norm is None else norm.k_weight.data_ptr(),
            rope.cos.data_ptr(),
            rope.sin.data_ptr(),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            out.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            rows,
            heads.q_heads,
            heads.kv_heads,
            heads.head_dim,
            rope.cos.shape[1],
            0.0 if norm is None else norm.eps,
            _threads(),
        )
        return out

    def attend(self, q: Tensor, heads: HeadLayout, scale: float, batch: PagedBatch, cache: KVCache) -> Tensor:
        if heads.head_dim > self._max_head_dim:
            return self._reference.attend(q, heads, scale, batch, cache)
        q = q.contiguous()
        out = torch.empty_like(q)
        if out.numel() > 0:
            status = self._attend(
                _TYPE_CODES[q.dtype],
                q.data_ptr(),
                cache.keys.data_ptr(),
                cache.values.data_ptr(),
                out.data_ptr(),
                batch.query_starts.data_ptr(),
                batch.context_lens.data_ptr(),
                batch.block_tables.data_ptr(),
                batch.block_tables.stride(0),
                batch.block_size,
                len(batch.query_lens),
                MAX_SHORT_QUERIES,
                heads.q_heads,
                heads.kv_heads,
                heads.head_dim,
                self._grouped(heads),
                scale,
                _threads(),
            )
            if status == _OUT_OF_MEMORY:
                raise MemoryError("no memory for the partial results of attention")
            if status != 0:
                raise RuntimeError(f"the native attention refused its arguments (status {status})")
            if len(batch.query_lens) > batch.num_single:
                attend_runs(q, heads, scale, batch, cache, out, shortest=MAX_SHORT_QUERIES + 1)
        return out.view(out.shape[0], heads.q_heads * heads.head_dim)

    def _grouped(self, heads: HeadLayout) -> "ctypes.Array[ctypes.c_int32]":
        """The query heads ordered by KV head: where each KV head's begin and end ([kv_heads + 1]), then the heads."""
        key = (heads.q_to_kv, heads.kv_heads)
        groups = self._groups.get(key)
        if groups is None:
            if any(not 0 <= kv < heads.kv_heads for kv in heads.q_to_kv) or len(heads.q_to_kv) != heads.q_heads:
                raise ValueError(f"a query head without a KV head of its rank in {heads}")
            order = sorted(range(heads.q_heads), key=heads.q_to_kv.__getitem__)
            starts = [sum(kv < head for kv in heads.q_to_kv) for head in range(heads.kv_heads + 1)]
            groups = (ctypes.c_int32 * (len(starts) + len(order)))(*starts, *order)
            self._groups[key] = groups
        return groups


def load_native() -> tuple[NativeKernels | None, str]:
    """The native kernels, or None, and one line that says which library was loaded or why there is none."""
    candidates = [Path(__file__).parent / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        return None, "the native kernels are not built"
    try:
        library = _load(path)
        version = int(library.shoal_abi_version())
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return (
            None,
            f"{path.name} is stale: it has interface {version}, this version needs {ABI_VERSION}; build it again",
        )
    return NativeKernels(library), f"native kernels from {path.name}"


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # The library names no OpenMP runtime and takes the one in the process. PyTorch usually makes its own visible
        # to libraries loaded later; where it did not, opening the loaded file again does.
        runtime = _loaded_openmp()
        if runtime is None:
            raise
        ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(path))


def _loaded_openmp() -> str | None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    mapped = (line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines())
    return next((name for name in mapped if Path(name).name.startswith(("libgomp", "libiomp5", "libomp"))), None)


def _function(library: ctypes.CDLL, name: str, restype: Any = None) -> Callable[..., Any]:
    function = library[name]
    function.argtypes = _SIGNATURES[name]
    function.restype = restype
    return function


_threads = torch.get_num_threads
