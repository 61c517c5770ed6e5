import pytest
import torch
from torch import Tensor

from kernels.common import BOTH_AND_TYPES, NATIVE, REFERENCE, TYPES, WHY, half_subnormal, threads, unit
from kernels.paged import make_batch
from kernels.test_norms import formula as norm_formula
from kernels.test_norms import make_norm
from shoal.kernels.base import HeadLayout, Kernels, KVCache, NormKind, PagedBatch, QKNorm, Rope
from shoal.kernels.native import NativeKernels

KINDS: list[NormKind | None] = [None, "rms", "rms_wide", "layer"]


@pytest.fixture
def native() -> NativeKernels:
    if NATIVE is None:
        pytest.skip(WHY)
    return NATIVE


def tables(positions: int, half: int) -> Rope:
    angles = torch.arange(positions).unsqueeze(1) / 10000 ** (torch.arange(half) / half)
    return Rope(angles.cos(), angles.sin())


def rotation_inputs(heads: HeadLayout, dtype: torch.dtype, n_seqs: int = 5) -> tuple[Tensor, PagedBatch, KVCache]:
    """Return qkv, and a batch and a cache for it."""
    lens = sorted((1 + 3 * (i % 3), 30 + i) for i in range(n_seqs))
    n = sum(queries for queries, _ in lens)
    batch, slots = make_batch(lens, 4, torch.Generator().manual_seed(1))
    qkv = torch.randn(n, (heads.q_heads + 2 * heads.kv_heads) * heads.head_dim).to(dtype)
    return qkv, batch, empty_cache(slots, heads, dtype)


def empty_cache(slots: int, heads: HeadLayout, dtype: torch.dtype) -> KVCache:
    return KVCache(*torch.zeros(2, slots, heads.kv_heads, heads.head_dim, dtype=dtype))


def norms(kind: NormKind | None, size: int, dtype: torch.dtype) -> QKNorm | None:
    if kind is None:
        return None
    bias = kind == "layer"
    return QKNorm(make_norm(kind, size, dtype, bias=bias), make_norm(kind, size, dtype, bias=bias))


def check(kernels: Kernels, heads: HeadLayout, dtype: torch.dtype, norm: QKNorm | None, rope: Rope | None) -> None:
    head_dim = heads.head_dim
    qkv, batch, cache = rotation_inputs(heads, dtype)
    before = qkv.clone()
    q = kernels.rotate_and_store(qkv, heads, norm, rope, batch, cache)
    assert q.shape == (len(qkv), heads.q_heads, head_dim)
    assert q.is_contiguous()
    assert torch.equal(qkv, before)
    half = 0 if rope is None else rope.cos.shape[1]
    parts = qkv.view(len(qkv), -1, head_dim).split([heads.q_heads, heads.kv_heads, heads.kv_heads], dim=1)
    for out, x, head_norm in (
        (q, parts[0], None if norm is None else norm.q),
        (cache.keys[batch.slots], parts[1], None if norm is None else norm.k),
    ):
        wanted, size = (x.double(), x.double().abs()) if head_norm is None else norm_formula(x, head_norm)
        if rope is not None:
            cos, sin = rope.cos[batch.positions].double()[:, None], rope.sin[batch.positions].double()[:, None]
            low, high, rest = wanted.split([half, half, head_dim - 2 * half], dim=-1)
            wanted = torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
            low, high, rest = size.split([half, half, head_dim - 2 * half], dim=-1)
            cos, sin = cos.abs(), sin.abs()
            size = torch.cat((low * cos + high * sin, high * cos + low * sin, rest), dim=-1)
        # The norm rounds at most twice and the rotation once; float32 arithmetic adds a few of its own units.
        roundings = (0 if norm is None else 2) + (0 if rope is None else 1)
        slack = roundings * 1.01 * unit(dtype) + 5 * unit(torch.float32)
        assert ((out.double() - wanted).abs() <= size * slack + roundings * half_subnormal(dtype)).all()
    assert torch.equal(cache.values[batch.slots], parts[2])
    untouched = torch.ones(len(cache.keys), dtype=torch.bool)
    untouched[batch.slots] = False
    assert not cache.keys[untouched].any()
    assert not cache.values[untouched].any()


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "half"),
    [(4, 2, 128, 64), (3, 2, 80, 40), (2, 2, 64, 8), (3, 1, 40, 5), (0, 2, 64, 32), (2, 0, 64, 32), (0, 0, 64, 32)],
)
def test_rotate_and_store(
    kernels: Kernels, dtype: torch.dtype, kind: NormKind | None, q_heads: int, kv_heads: int, head_dim: int, half: int
) -> None:
    heads = HeadLayout(q_heads, kv_heads, head_dim, (0,) * q_heads)
    check(kernels, heads, dtype, norms(kind, head_dim, dtype), tables(100, half))


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(4, 2, 64), (3, 1, 40), (0, 2, 8), (2, 0, 8)])
def test_no_rotation(
    kernels: Kernels, dtype: torch.dtype, kind: NormKind | None, q_heads: int, kv_heads: int, head_dim: int
) -> None:
    heads = HeadLayout(q_heads, kv_heads, head_dim, (0,) * q_heads)
    check(kernels, heads, dtype, norms(kind, head_dim, dtype), None)


def test_queries_without_rotation_are_not_a_view_of_their_input() -> None:
    heads = HeadLayout(2, 0, 8, (0, 0))
    qkv, batch, cache = rotation_inputs(heads, torch.float32)
    q = REFERENCE.rotate_and_store(qkv, heads, None, None, batch, cache)
    assert q.data_ptr() != qkv.data_ptr()


def test_norms_of_two_kinds(native: NativeKernels) -> None:
    mixed = QKNorm(make_norm("layer", 40, torch.bfloat16), make_norm("rms_wide", 40, torch.bfloat16))
    check(native, HeadLayout(3, 2, 40, (0, 0, 1)), torch.bfloat16, mixed, tables(100, 20))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotated", [False, True])
def test_rows_have_the_same_bits_with_any_threads_and_batch(
    native: NativeKernels, dtype: torch.dtype, kind: NormKind | None, rotated: bool
) -> None:
    heads = HeadLayout(16, 8, 96, tuple(i // 2 for i in range(16)))
    qkv, batch, cache = rotation_inputs(heads, dtype, n_seqs=40)
    norm, rope = norms(kind, 96, dtype), tables(100, 40) if rotated else None
    results = []
    for count in (1, 2, 4):
        with threads(count):
            cache = empty_cache(len(cache.keys), heads, dtype)
            results.append((native.rotate_and_store(qkv, heads, norm, rope, batch, cache), cache.keys, cache.values))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    # A batch of the second sequence alone, which has one query.
    one, _ = make_batch([(1, int(batch.positions[1]) + 1)], 4, torch.Generator())
    cache = empty_cache(64, heads, dtype)
    assert torch.equal(native.rotate_and_store(qkv[1:2], heads, norm, rope, one, cache), results[0][0][1:2])
    assert torch.equal(cache.keys[one.slots], results[0][1][batch.slots[1:2]])
