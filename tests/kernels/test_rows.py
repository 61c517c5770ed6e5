"""Norms, activations and rotations."""

import threading

import pytest
import torch
from torch import Tensor

from kernels.paged import make_batch
from shoal.kernels.base import HeadLayout, Kernels, KVCache, QKNorm, Rope
from shoal.kernels.native import NativeKernels, load_native
from shoal.kernels.reference import ReferenceKernels

NATIVE, WHY = load_native()
REFERENCE = ReferenceKernels()
needs_native = pytest.mark.skipif(NATIVE is None, reason=WHY)
BOTH = [pytest.param(NATIVE, id="native", marks=needs_native), pytest.param(REFERENCE, id="reference")]
TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def native() -> NativeKernels:
    if NATIVE is None:
        pytest.skip(WHY)
    return NATIVE


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return float(torch.finfo(dtype).eps) / 2


def close(out: Tensor, wanted: Tensor, roundings: int) -> None:
    """Each rounding to the dtype may add its unit; float32 arithmetic in between a few units of its own."""
    error = (out.double() - wanted).abs()
    # Float32 sums lose a little more than their last rounding: three more units of it.
    assert (error <= wanted.abs() * (roundings * 1.01 * unit(out.dtype) + 3 * unit(torch.float32)) + 1e-30).all()


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (3, 33), (7, 1), (0, 64), (130, 1000)])
def test_rms_norm(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    before = x.clone()
    close(kernels.rms_norm(x, weight, 1e-6), rms(x, weight, 1e-6), 2)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (3, 33), (0, 64), (130, 1000)])
def test_add_rms_norm(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    wanted = x + residual
    out, total = kernels.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    assert torch.equal(total, wanted)
    close(out, rms(wanted, weight, 1e-6), 2)


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(1, 3072), (3, 33), (5, 0), (0, 64), (40, 1000)])
def test_silu_mul(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape[0], 2 * shape[1]) * 5).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    close(kernels.silu_mul(x), gate * torch.sigmoid(gate) * up, 2)


@pytest.mark.parametrize("dtype", TYPES)
def test_silu_of_extremes(native: NativeKernels, dtype: torch.dtype) -> None:
    gate = torch.tensor([[-1e38, -100.0, -89.0, -88.0, -87.0, -86.0, -0.0, 0.0, 86.0, 90.0, 1e38, torch.inf]]).to(dtype)
    out = native.silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=-1)).double()
    wanted = gate.double() * torch.sigmoid(gate.double())
    # Below -86 the exponential overflows and the result, smaller than 1e-35, is cut to zero.
    assert ((out == wanted) | ((out - wanted).abs() <= wanted.abs() * 2 * unit(dtype) + 1e-35)).all()
    assert torch.isnan(native.silu_mul(torch.full((1, 66), torch.nan, dtype=dtype))).all()


def tables(positions: int, half: int) -> Rope:
    angles = torch.arange(positions).unsqueeze(1) / 10000 ** (torch.arange(half) / half)
    return Rope(angles.cos(), angles.sin())


def rotation_inputs(
    heads: HeadLayout, half: int, dtype: torch.dtype, norm: bool, n_seqs: int = 5
) -> tuple[Tensor, QKNorm | None, Rope, list[tuple[int, int]]]:
    lens = sorted((1 + 3 * (i % 3), 30 + i) for i in range(n_seqs))
    n = sum(queries for queries, _ in lens)
    qkv = torch.randn(n, (heads.q_heads + 2 * heads.kv_heads) * heads.head_dim).to(dtype)
    weights = torch.randn(2, heads.head_dim).to(dtype)
    return qkv, QKNorm(weights[0], weights[1], 1e-6) if norm else None, tables(100, half), lens


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "half"),
    [(4, 2, 128, 64), (3, 2, 80, 40), (2, 2, 64, 8), (3, 1, 40, 5), (0, 2, 64, 32), (2, 0, 64, 32), (0, 0, 64, 32)],
)
def test_rotate_and_store(
    kernels: Kernels, dtype: torch.dtype, norm: bool, q_heads: int, kv_heads: int, head_dim: int, half: int
) -> None:
    heads = HeadLayout(q_heads, kv_heads, head_dim, (0,) * q_heads)
    qkv, weights, rope, lens = rotation_inputs(heads, half, dtype, norm)
    batch, slots = make_batch(lens, 4, torch.Generator().manual_seed(1))
    cache = KVCache(*torch.zeros(2, slots, kv_heads, head_dim, dtype=dtype))
    q = kernels.rotate_and_store(qkv, heads, weights, rope, batch, cache)
    assert q.shape == (len(qkv), q_heads, head_dim)

    def turned(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The result, and the size of what was added up to give it."""
        wide = x.double() if weight is None else rms(x, weight, 1e-6)
        cos, sin = rope.cos[batch.positions].double()[:, None], rope.sin[batch.positions].double()[:, None]
        low, high, rest = wide.split([half, half, head_dim - 2 * half], dim=-1)
        parts = (low * cos - high * sin, high * cos + low * sin, rest)
        sizes = ((low * cos).abs() + (high * sin).abs(), (high * cos).abs() + (low * sin).abs(), rest.abs())
        return torch.cat(parts, dim=-1), torch.cat(sizes, dim=-1)

    parts = qkv.view(len(qkv), -1, head_dim).split([q_heads, kv_heads, kv_heads], dim=1)
    for out, x, weight in (
        (q, parts[0], None if weights is None else weights.q_weight),
        (cache.keys[batch.slots], parts[1], None if weights is None else weights.k_weight),
    ):
        wanted, size = turned(x, weight)
        # Two roundings of the norm, one of the rotation; float32 arithmetic adds a few units of its own.
        bound = size * ((3.03 if norm else 1.01) * unit(dtype) + 4 * unit(torch.float32))
        assert ((out.double() - wanted).abs() <= bound).all()
    assert torch.equal(cache.values[batch.slots], parts[2])
    untouched = torch.ones(slots, dtype=torch.bool)
    untouched[batch.slots] = False
    assert not cache.keys[untouched].any()
    assert not cache.values[untouched].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_have_the_same_bits_in_any_batch(native: NativeKernels, dtype: torch.dtype) -> None:
    # 200 rows go to all threads, one row to one.
    x, residual = torch.randn(2, 200, 1000).to(dtype)
    weight = torch.randn(1000).to(dtype)
    normed, (added, total), gated = (
        native.rms_norm(x, weight, 1e-6),
        native.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6),
        native.silu_mul(x),
    )
    for i in (0, 1, 77, 199):
        row = slice(i, i + 1)
        assert torch.equal(native.rms_norm(x[row], weight, 1e-6), normed[row])
        assert torch.equal(native.silu_mul(x[row]), gated[row])
        one, one_total = native.add_rms_norm(x[row].clone(), residual[row].clone(), weight, 1e-6)
        assert torch.equal(one, added[row])
        assert torch.equal(one_total, total[row])


@pytest.mark.parametrize("dtype", TYPES)
def test_rotations_have_the_same_bits_with_any_threads(native: NativeKernels, dtype: torch.dtype) -> None:
    heads = HeadLayout(16, 8, 128, tuple(i // 2 for i in range(16)))
    qkv, norm, rope, lens = rotation_inputs(heads, 64, dtype, norm=True, n_seqs=40)
    batch, slots = make_batch(lens, 16, torch.Generator())
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            cache = KVCache(*torch.zeros(2, slots, 8, 128, dtype=dtype))
            results.append((native.rotate_and_store(qkv, heads, norm, rope, batch, cache), cache.keys, cache.values))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_ranks_may_be_threads(native: NativeKernels) -> None:
    inputs = [torch.randn(64, 2048) for _ in range(4)]
    wanted = [native.silu_mul(x) for x in inputs]
    results: list[bool] = []

    def rank(i: int) -> None:
        results.extend(torch.equal(native.silu_mul(inputs[i]), wanted[i]) for _ in range(20))

    ranks = [threading.Thread(target=rank, args=(i,)) for i in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert results == [True] * 80
