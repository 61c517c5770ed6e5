from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.paged import Case, alone, formula, make_case, rows_of_sequence
from shoal.kernels.base import Kernels
from shoal.kernels.native import MAX_SHORT_QUERIES, NativeKernels, load_native
from shoal.kernels.reference import ReferenceKernels, is_regular

NATIVE, WHY = load_native()
REFERENCE = ReferenceKernels()
needs_native = pytest.mark.skipif(NATIVE is None, reason=WHY)
BOTH = [pytest.param(NATIVE, id="native", marks=needs_native), pytest.param(REFERENCE, id="reference")]

GQA = (0, 0, 0, 0, 1, 1, 1, 1)
LAYOUTS = [
    ((0, 1), 2),
    ((0, 0, 1), 2),
    ((1, 0, 1, 1, 0), 2),
    ((0, 2), 3),  # a KV head that nobody reads
    (GQA, 2),
    (tuple(i // 15 for i in range(15)), 1),  # groups of 8, 4, 2 and 1
]
MIXED = [(1, 1), (1, 37), (1, 256), (1, 257), (1, 700), (2, 2), (3, 300), (8, 20), (12, 12), (9, 270)]


@pytest.fixture
def native() -> NativeKernels:
    if NATIVE is None:
        pytest.skip(WHY)
    return NATIVE


def attend(kernels: Kernels, case: Case) -> Tensor:
    return kernels.attend(case.q, case.heads, case.scale, case.batch, case.cache)


def check(kernels: Kernels, case: Case) -> None:
    out = attend(kernels, case)
    wanted, size = formula(case)
    assert out.dtype == case.q.dtype
    assert out.shape == wanted.shape
    # Scores stay below 8 here and are off by a few 2^-23 in float32, each weight by as much of itself.
    slack = 5e-6
    if case.q.dtype != torch.float32:
        unit = float(torch.finfo(case.q.dtype).eps) / 2
        # The output is rounded once. PyTorch rounds the weights too, before it multiplies them with the values; the
        # native kernels do not.
        fused = isinstance(kernels, NativeKernels) and max(case.batch.query_lens) <= MAX_SHORT_QUERIES
        slack += 0 if fused else 1.01 * unit
        assert ((out.double() - wanted).abs() <= wanted.abs() * unit * 1.01 + size * slack).all()
    else:
        assert ((out.double() - wanted).abs() <= size * slack).all()


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("q_to_kv", "kv_heads"), LAYOUTS)
def test_layouts(kernels: Kernels, dtype: torch.dtype, q_to_kv: tuple[int, ...], kv_heads: int) -> None:
    check(kernels, make_case(MIXED, q_to_kv, kv_heads, 64, dtype))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_head_and_block_sizes(kernels: Kernels, dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    check(kernels, make_case([(1, 5), (1, 300), (4, 19), (10, 30)], (0, 0, 1), 2, head_dim, dtype, block_size))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decodes_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    lens = [(1, context) for context in (1, 2, 15, 16, 17, 255, 256, 257, 512, 513)]
    check(kernels, make_case(lens, GQA, 2, 80, dtype))


def test_float16() -> None:
    check(REFERENCE, make_case(MIXED, GQA, 2, 64, torch.float16))


def test_heads_beyond_the_native_limit(native: NativeKernels) -> None:
    check(native, make_case([(1, 20), (3, 20)], (0, 0), 1, 520))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(0, 0), (0, 2)])
def test_no_query_heads(kernels: Kernels, q_heads: int, kv_heads: int) -> None:
    case = make_case(MIXED, (), kv_heads, 64)
    assert case.heads.q_heads == q_heads
    assert attend(kernels, case).shape == (len(case.q), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_rows_have_the_same_bits_in_any_batch(native: NativeKernels, dtype: torch.dtype, kv_heads: int) -> None:
    lens = [(1, 1), (1, 160), (1, 256), (1, 300), (1, 1500), (2, 40), (5, 700), (8, 1000), (9, 50), (40, 120)]
    case = make_case(lens, tuple(i // 2 for i in range(2 * kv_heads)), kv_heads, 128, dtype)
    together = attend(native, case)
    for i in range(len(lens)):
        assert torch.equal(attend(native, alone(case, i)), together[rows_of_sequence(case, i)]), lens[i]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_have_the_same_bits_with_any_threads(native: NativeKernels, dtype: torch.dtype) -> None:
    case = make_case([(1, 2000), (1, 10), (1, 300), (7, 600)], GQA, 2, 128, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(attend(native, case))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_verified_token_has_the_bits_of_a_decoded_one(native: NativeKernels) -> None:
    run = make_case([(5, 300)], GQA, 2, 64, torch.bfloat16)
    together = attend(native, run)
    for j in range(5):
        seen = 296 + j
        batch = replace(
            run.batch,
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=torch.tensor([seen], dtype=torch.int32),
            num_single=1,
            query_lens=(1,),
            host_context_lens=(seen,),
        )
        decoded = native.attend(run.q[j : j + 1], run.heads, run.scale, batch, run.cache)
        assert torch.equal(decoded[0], together[j])


def test_large_scores_do_not_overflow(native: NativeKernels) -> None:
    case = make_case([(1, 600), (3, 40)], GQA, 2, 64)
    huge = Case(case.q * 300, case.heads, case.scale, case.batch, case.cache)
    out = attend(native, huge)
    # Scores of about 1000 are off by up to 1000 * 2^-22, and the weights with them.
    wanted, size = formula(huge)
    assert ((out.double() - wanted).abs() <= size * 2e-3).all()


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 560)), min_size=1, max_size=5),
    q_to_kv=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    head_dim=st.sampled_from([8, 24, 64, 96]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    block_size=st.sampled_from([1, 4, 16, 32]),
    seed=st.integers(0, 1000),
)
def test_random_batches(
    lens: list[tuple[int, int]], q_to_kv: list[int], head_dim: int, dtype: torch.dtype, block_size: int, seed: int
) -> None:
    ordered = sorted((queries, queries + before) for queries, before in lens)
    case = make_case(ordered, tuple(q_to_kv), 3, head_dim, dtype, block_size, seed)
    check(REFERENCE, case)
    if NATIVE is not None:
        check(NATIVE, case)


@pytest.mark.parametrize(
    ("q_to_kv", "kv_heads", "regular"),
    [((0, 0, 1, 1), 2, True), ((0, 1), 2, True), ((0, 0, 1), 2, False), ((0, 1, 0, 1), 2, False), ((), 0, False)],
)
def test_regular_layouts(q_to_kv: tuple[int, ...], kv_heads: int, regular: bool) -> None:
    assert is_regular(make_case([(1, 1)], q_to_kv, kv_heads, 8).heads) is regular


def test_a_query_head_without_a_kv_head_is_refused(native: NativeKernels) -> None:
    case = make_case([(1, 4)], (0, 3), 2, 64)
    with pytest.raises(ValueError, match="without a KV head"):
        attend(native, case)
