"""The kernels in C++ for the CPU, called through ctypes: rows, sums, attention and routing in `csrc/`.

A row's result has the same bits in any batch, with any number of threads, and however a prompt is cut into chunks.
"""

import ctypes
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.kernels.base import (
    Activation,
    AttentionParams,
    ExpertPairs,
    HeadLayout,
    KVCache,
    Norm,
    NormKind,
    PagedBatch,
    QKNorm,
    Rope,
    Routing,
)
from shoal.kernels.kv_rows import KV_DTYPES
from shoal.kernels.native_calls import NativeFunction, empty
from shoal.kernels.reference import ReferenceKernels
from shoal.native_library import bind, open_library

ABI_VERSION = 10

_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
_CACHE_TYPE_CODES = {dtype: code for code, dtype in enumerate(KV_DTYPES.values())}  # as in csrc/cache_types.h
_NORM_CODES: dict[NormKind, int] = {"rms": 0, "rms_wide": 1, "layer": 2}
_NO_NORM = -1
_ACTIVATION_CODES: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_NO_WINDOW = 2**62
AttentionLevel = Literal["portable", "avx2", "best"]
_ATTENTION_LEVELS: dict[AttentionLevel, int] = {"portable": 0, "avx2": 1, "best": 2}  # as in csrc/attention_tiles.h
_OUT_OF_MEMORY = 1

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "shoal_norm": [_INT, _INT, *[_POINTER] * 4, _LONG, _LONG, _FLOAT, _LONG],
    "shoal_add_norm": [_INT, _INT, *[_POINTER] * 4, _LONG, _LONG, _FLOAT, _LONG],
    "shoal_activate": [_INT, _INT, *[_POINTER] * 2, _LONG, _LONG, _LONG],
    "shoal_activate_gated": [_INT, _INT, *[_POINTER] * 2, _LONG, _LONG, _LONG],
    "shoal_add": [_INT, *[_POINTER] * 2, *[_LONG] * 4],
    "shoal_scale": [_INT, _POINTER, _FLOAT, *[_LONG] * 3],
    "shoal_weighted_sum": [_INT, *[_POINTER] * 4, *[_LONG] * 4],
    "shoal_rotate_and_store": [
        *[_INT, _INT, _INT, _POINTER],
        *[_POINTER, _POINTER, _FLOAT] * 2,
        *[_POINTER] * 9,
        *[_LONG] * 6,
    ],
    "shoal_route": [_INT, *[_POINTER] * 3, _LONG, *[_POINTER] * 2, _LONG],
    "shoal_group_pairs": [_POINTER, *[_LONG] * 3, *[_POINTER] * 3],
    "shoal_attend": [_INT, _INT, _INT, *[_POINTER] * 9, *[_LONG] * 6, _POINTER, _LONG, _FLOAT, _FLOAT, _LONG],
}


class _Routing(ctypes.Structure):
    """`Routing` in `csrc/routing.cpp`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("experts", "top_k", "groups", "top_groups")),
        *((name, ctypes.c_int32) for name in ("sigmoid", "best_two", "normalize")),
        ("scale", ctypes.c_float),
    )


class NativeKernels:
    """The C++ implementation of `shoal.kernels.base.Kernels` for float32 and bfloat16; `load_native` makes one.

    Threads may share one object. All tensors of a call have the same dtype, except the rotary tables and the weights of
    rms_wide, which are float32, and the KV cache.
    """

    def __init__(self, library: ctypes.CDLL, attention: AttentionLevel = "best") -> None:
        """`attention`: the instructions that attention may use; others than "best" are for tests."""
        self._attention_level = _ATTENTION_LEVELS[attention]
        self._norm = _function(library, "shoal_norm")
        self._add_norm = _function(library, "shoal_add_norm")
        self._activate = _function(library, "shoal_activate")
        self._activate_gated = _function(library, "shoal_activate_gated")
        self._add = _function(library, "shoal_add")
        self._scale = _function(library, "shoal_scale")
        self._weighted_sum = _function(library, "shoal_weighted_sum")
        self._rotate_and_store = _function(library, "shoal_rotate_and_store")
        self._route = bind(library, "shoal_route", _SIGNATURES["shoal_route"])
        self._group_pairs = bind(library, "shoal_group_pairs", _SIGNATURES["shoal_group_pairs"], _LONG)
        self._most_routed_experts = int(library.shoal_most_routed_experts())
        self._attend = _function(library, "shoal_attend", _INT)
        self._max_head_dim = int(library.shoal_max_head_dim())
        self._groups: dict[tuple[tuple[int, ...], int], ctypes.Array[ctypes.c_int32]] = {}
        self._reference = ReferenceKernels()

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        x = x.contiguous()
        out = empty(x.shape, x.dtype)
        rows, size = x.shape
        weight, bias = _addresses(norm, x.dtype)
        self._norm(
            _TYPE_CODES[x.dtype],
            _NORM_CODES[norm.kind],
            x.data_ptr(),
            weight,
            bias,
            out.data_ptr(),
            rows,
            size,
            norm.eps,
            _threads(),
        )
        return out

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        rows, size = x.shape
        weight, bias = _addresses(norm, x.dtype)
        self._add_norm(
            _TYPE_CODES[x.dtype],
            _NORM_CODES[norm.kind],
            x.data_ptr(),
            residual.data_ptr(),
            weight,
            bias,
            rows,
            size,
            norm.eps,
            _threads(),
        )
        return x, residual

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        x = x.contiguous()
        code, address = _ACTIVATION_CODES[activation], x.data_ptr()
        self._activate(_TYPE_CODES[x.dtype], code, address, address, x.shape[0], x.shape[1], _threads())
        return x

    def activate_gated(self, gate_up: Tensor, activation: Activation) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = empty((rows, size), gate_up.dtype)
        code = _ACTIVATION_CODES[activation]
        self._activate_gated(
            _TYPE_CODES[gate_up.dtype], code, gate_up.data_ptr(), out.data_ptr(), rows, size, _threads()
        )
        return out

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        rows, size = x.shape
        if y.dtype is not x.dtype or y.shape not in (x.shape, x.shape[1:]):
            raise ValueError(f"{list(y.shape)} in {y.dtype} cannot be added to {list(x.shape)} in {x.dtype}")
        step = size if y.dim() == 2 else 0
        self._add(_TYPE_CODES[x.dtype], x.data_ptr(), y.data_ptr(), step, rows, size, _threads())
        return x

    def scale(self, x: Tensor, factor: float) -> Tensor:
        x = x.contiguous()
        self._scale(_TYPE_CODES[x.dtype], x.data_ptr(), factor, x.shape[0], x.shape[1], _threads())
        return x

    def weighted_sum(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        x, indices, weights = x.contiguous(), indices.contiguous(), weights.contiguous()
        rows, k = indices.shape
        out = empty((rows, x.shape[1]), x.dtype)
        self._weighted_sum(
            _TYPE_CODES[x.dtype],
            x.data_ptr(),
            indices.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
            rows,
            k,
            x.shape[1],
            _threads(),
        )
        return out

    def route(self, logits: Tensor, rule: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, count = logits.shape
        if count > self._most_routed_experts or logits.dtype not in _TYPE_CODES:
            return self._reference.route(logits, rule, bias)
        logits = logits.contiguous()
        experts = torch.empty((rows, rule.top_k), dtype=torch.int64)
        weights = torch.empty((rows, rule.top_k), dtype=torch.float32)
        given = _Routing(
            *(count, rule.top_k, rule.groups, rule.top_groups),
            *(rule.scoring == "sigmoid", rule.group_score == "best_two", rule.normalize, rule.scale),
        )
        self._route(
            *(_TYPE_CODES[logits.dtype], ctypes.addressof(given), logits.data_ptr(), _address(bias), rows),
            *(experts.data_ptr(), weights.data_ptr(), _threads()),
        )
        return experts, weights

    def group_pairs(self, experts: Tensor, count: int) -> ExpertPairs:
        experts = experts.contiguous()
        counts = (ctypes.c_int64 * count)()
        rows, places = torch.empty(experts.numel(), dtype=torch.int64), torch.empty_like(experts)
        found = self._group_pairs(
            *(experts.data_ptr(), experts.numel(), max(experts.shape[1], 1), count),
            *(ctypes.addressof(counts), rows.data_ptr(), places.data_ptr()),
        )
        return ExpertPairs(list(counts), rows[:found], places)

    def rotate_and_store(
        self,
        qkv: Tensor,
        heads: HeadLayout,
        norm: QKNorm | None,
        rope: Rope | None,
        batch: PagedBatch,
        cache: KVCache,
    ) -> Tensor:
        if heads.head_dim > self._max_head_dim or (norm is not None and norm.q.kind != norm.k.kind):
            return self._reference.rotate_and_store(qkv, heads, norm, rope, batch, cache)
        qkv = qkv.contiguous()
        rows = qkv.shape[0]
        out = empty((rows, heads.q_heads, heads.head_dim), qkv.dtype)
        self._rotate_and_store(
            _TYPE_CODES[qkv.dtype],
            _CACHE_TYPE_CODES[cache.keys.dtype],
            _NO_NORM if norm is None else _NORM_CODES[norm.q.kind],
            qkv.data_ptr(),
            *((None, None, 0.0) if norm is None else (*_addresses(norm.q, qkv.dtype), norm.q.eps)),
            *((None, None, 0.0) if norm is None else (*_addresses(norm.k, qkv.dtype), norm.k.eps)),
            None if rope is None else rope.cos.data_ptr(),
            None if rope is None else rope.sin.data_ptr(),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            out.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            _address(cache.key_scales),
            _address(cache.value_scales),
            rows,
            heads.q_heads,
            heads.kv_heads,
            heads.head_dim,
            0 if rope is None else rope.cos.shape[1],
            _threads(),
        )
        return out

    def attend(
        self, q: Tensor, heads: HeadLayout, params: AttentionParams, batch: PagedBatch, cache: KVCache
    ) -> Tensor:
        if heads.head_dim > self._max_head_dim:
            return self._reference.attend(q, heads, params, batch, cache)
        q = q.contiguous()
        out = empty(q.shape, q.dtype)
        if out.numel() > 0:
            status = self._attend(
                _TYPE_CODES[q.dtype],
                _CACHE_TYPE_CODES[cache.keys.dtype],
                self._attention_level,
                q.data_ptr(),
                cache.keys.data_ptr(),
                cache.values.data_ptr(),
                _address(cache.key_scales),
                _address(cache.value_scales),
                out.data_ptr(),
                batch.query_starts.data_ptr(),
                batch.context_lens.data_ptr(),
                batch.block_tables.data_ptr(),
                batch.block_tables.stride(0),
                batch.block_size,
                len(batch.query_lens),
                heads.q_heads,
                heads.kv_heads,
                heads.head_dim,
                self._head_groups(heads),
                _NO_WINDOW if params.window is None else params.window,
                params.scale,
                params.softcap or 0.0,
                _threads(),
            )
            if status == _OUT_OF_MEMORY:
                raise MemoryError("out of memory for the intermediate results of attention")
            if status != 0:
                raise RuntimeError(f"the native attention kernel refused its arguments (status {status})")
        return out.view(out.shape[0], heads.q_heads * heads.head_dim)

    def _head_groups(self, heads: HeadLayout) -> "ctypes.Array[ctypes.c_int32]":
        """Return the query heads ordered by KV head: first the start of each KV head's group ([kv_heads + 1]), then
        the query heads ([q_heads])."""
        key = (heads.q_to_kv, heads.kv_heads)
        groups = self._groups.get(key)
        if groups is None:
            if any(not 0 <= kv < heads.kv_heads for kv in heads.q_to_kv) or len(heads.q_to_kv) != heads.q_heads:
                raise ValueError(f"a query head without a KV head on its rank: {heads}")
            order = sorted(range(heads.q_heads), key=heads.q_to_kv.__getitem__)
            starts = [sum(kv < head for kv in heads.q_to_kv) for head in range(heads.kv_heads + 1)]
            groups = (ctypes.c_int32 * (len(starts) + len(order)))(*starts, *order)
            self._groups[key] = groups
        return groups


def load_native() -> tuple[NativeKernels | None, str]:
    """Return the native kernels, or None, and one line that names the loaded library or says why there is none."""
    library, reason = load_native_library()
    if library is None:
        return None, reason
    return NativeKernels(library), f"native kernels from {reason}"


def load_native_library() -> tuple[ctypes.CDLL | None, str]:
    """Return the library of the native kernels; see `open_library`."""
    return open_library(Path(__file__).parent, "_native", "shoal_abi_version", ABI_VERSION)


def _function(library: ctypes.CDLL, name: str, result: type[ctypes.c_int32] | None = None) -> NativeFunction:
    return NativeFunction(library, name, _SIGNATURES[name], result)


def _addresses(norm: Norm, dtype: torch.dtype) -> tuple[int | None, int | None]:
    """Return the addresses of a norm's weight and bias, for rows of `dtype`.

    Raises:
        ValueError: C++ would misread the weights, since they have another dtype.
    """
    wanted = torch.float32 if norm.kind == "rms_wide" else dtype
    weight, bias = norm.weight, norm.bias
    if (weight is not None and weight.dtype is not wanted) or (bias is not None and bias.dtype is not wanted):
        raise ValueError(f"a norm of kind {norm.kind} over {dtype} needs weights in {wanted}")
    return _address(weight), _address(bias)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


_threads = torch.get_num_threads
