import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import ATTENTION, BOTH, NATIVE, REFERENCE, TYPES, WHY, needs_native, threads
from kernels.paged import Case, alone, chunk, formula, make_case, rows_of_sequence
from shoal.kernels import reference as reference_module
from shoal.kernels.base import Kernels, KVCache
from shoal.kernels.kv_rows import KV_DTYPES
from shoal.kernels.native import NativeKernels
from shoal.kernels.reference import has_equal_groups

GQA = (0, 0, 0, 0, 1, 1, 1, 1)
LAYOUTS = [
    ((0, 1), 2),
    ((0, 0, 1), 2),
    ((1, 0, 1, 1, 0), 2),
    ((0, 2), 3),  # a KV head without query heads
    (GQA, 2),
    (tuple(i // 15 for i in range(15)), 1),  # groups of 8, 4, 2 and 1
]
CACHE_TYPES = st.sampled_from(["", *KV_DTYPES])
MIXED = [(1, 1), (1, 37), (1, 256), (1, 257), (1, 700), (2, 2), (3, 300), (8, 20), (12, 12), (9, 270)]


@pytest.fixture
def native() -> NativeKernels:
    if NATIVE is None:
        pytest.skip(WHY)
    return NATIVE


def attend(kernels: Kernels, case: Case) -> Tensor:
    return kernels.attend(case.q, case.heads, case.params, case.batch, case.cache)


def check(kernels: Kernels, case: Case) -> None:
    out = attend(kernels, case)
    wanted, size = formula(case)
    assert out.dtype == case.q.dtype
    assert out.shape == wanted.shape
    # Scores are below 8 here, and their float32 error is a few times 2^-23; that is the relative error of a weight.
    slack = 5e-6
    if case.q.dtype != torch.float32:
        unit = float(torch.finfo(case.q.dtype).eps) / 2
        # The output is rounded once. Most implementations also round the weights before they multiply them with the
        # values. The native kernels divide by the sum of the rounded weights, whose error counts too.
        if isinstance(kernels, NativeKernels):
            slack += 2.02 * unit
        elif case.cache.key_scales is not None:
            # Keys and values are rounded when they are multiplied with their scales. The error of a score is a sum of
            # independent errors whose standard deviation is below one unit here; five of these are allowed.
            slack += (1 + 1 + 5) * 1.01 * unit
        elif case.params.softcap is None:
            slack += 1.01 * unit
        assert ((out.double() - wanted).abs() <= wanted.abs() * unit * 1.01 + size * slack).all()
    else:
        assert ((out.double() - wanted).abs() <= size * slack).all()


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("q_to_kv", "kv_heads"), LAYOUTS)
def test_layouts(kernels: Kernels, dtype: torch.dtype, q_to_kv: tuple[int, ...], kv_heads: int) -> None:
    check(kernels, make_case(MIXED, q_to_kv, kv_heads, 64, dtype))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_head_and_block_sizes(kernels: Kernels, dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    check(kernels, make_case([(1, 5), (1, 300), (4, 19), (10, 30)], (0, 0, 1), 2, head_dim, dtype, block_size))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
def test_decodes_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    lens = [(1, context) for context in (1, 2, 15, 16, 17, 255, 256, 257, 512, 513)]
    check(kernels, make_case(lens, GQA, 2, 80, dtype))


WINDOWS = [None, 1, 2, 100, 256, 257, 400, 10_000]


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_and_softcaps(kernels: Kernels, dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    lens = [*MIXED, (270, 270), (20, 600)]
    check(kernels, make_case(lens, (0, 0, 1, 1), 2, 48, dtype, window=window, softcap=softcap))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize(("q_to_kv", "kv_heads"), LAYOUTS)
def test_layouts_with_a_window_and_a_softcap(kernels: Kernels, q_to_kv: tuple[int, ...], kv_heads: int) -> None:
    check(kernels, make_case(MIXED, q_to_kv, kv_heads, 24, torch.bfloat16, 4, window=200, softcap=2.0))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("window", [1, 7, 64])
def test_keys_before_the_window_are_not_read(kernels: Kernels, window: int) -> None:
    case = make_case([(1, 40), (1, 300), (2, 90), (5, 70), (20, 100)], (0, 0), 1, 16, window=window)
    wanted = attend(kernels, case)
    for table, context, queries in zip(
        case.batch.block_tables, case.batch.host_context_lens, case.batch.query_lens, strict=True
    ):
        where = torch.arange(max(0, context - queries - window + 1))
        case.cache.values[table[where // 16].long() * 16 + where % 16] = torch.nan
    assert torch.equal(attend(kernels, case), wanted)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_multi_queries_in_several_calls(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    monkeypatch.setattr(reference_module, "WINDOW_QUERIES", 8)
    monkeypatch.setattr(reference_module, "SCORE_BYTES", 4 * 3 * 4 * 60)
    lens = [(1, 30), (1, 50), (2, 2), (20, 20), (30, 60), (33, 100)]
    for window in (None, 1, 5, 40, 1000):
        check(REFERENCE, make_case(lens, (0, 1, 1), 2, 16, torch.float32, 4, window=window, softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_single_queries_in_groups(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    monkeypatch.setattr(reference_module, "GATHER_BYTES", 2 * 3 * 16 * 4 * 64)
    lens = [(1, context) for context in (5, 20, 60, 100, 3, 40)]
    for window in (None, 25):
        check(REFERENCE, make_case(lens, (0, 1, 1), 2, 16, torch.float32, 4, window=window, softcap=softcap))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [40, 576])
def test_values_that_are_the_keys(kernels: Kernels, dtype: torch.dtype, head_dim: int) -> None:
    """Latent attention has such a cache: here 11 query heads read one cached row per token."""
    case = make_case([(1, 5), (1, 300), (3, 270), (9, 9), (20, 60), (70, 80)], (0,) * 11, 1, head_dim, dtype)
    check(kernels, replace(case, cache=KVCache(case.cache.keys, case.cache.keys)))


def test_float16() -> None:
    check(REFERENCE, make_case(MIXED, GQA, 2, 64, torch.float16))
    check(REFERENCE, make_case(MIXED, GQA, 2, 64, torch.float16, window=30, softcap=20.0))


def test_heads_beyond_the_native_limit(native: NativeKernels) -> None:
    check(native, make_case([(1, 20), (3, 20)], (0, 0), 1, 584))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(0, 0), (0, 2)])
def test_no_query_heads(kernels: Kernels, q_heads: int, kv_heads: int) -> None:
    case = make_case(MIXED, (), kv_heads, 64)
    assert case.heads.q_heads == q_heads
    assert attend(kernels, case).shape == (len(case.q), 0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (None, 5.0), (300, None), (100, 5.0)])
def test_rows_have_the_same_bits_in_any_batch(
    native: NativeKernels, dtype: torch.dtype, kv_heads: int, window: int | None, softcap: float | None
) -> None:
    lens = [(1, 1), (1, 160), (1, 256), (1, 300), (1, 1500), (2, 40), (5, 700), (8, 1000), (9, 50), (40, 120)]
    q_to_kv = tuple(i // 2 for i in range(2 * kv_heads))
    case = make_case(lens, q_to_kv, kv_heads, 128, dtype, window=window, softcap=softcap)
    together = attend(native, case)
    for i in range(len(lens)):
        assert torch.equal(attend(native, alone(case, i)), together[rows_of_sequence(case, i)]), lens[i]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (700, 5.0)])
def test_rows_have_the_same_bits_with_any_threads(
    native: NativeKernels, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    lens = [(1, 2000), (1, 10), (1, 300), (7, 600), (200, 500)]
    case = make_case(lens, GQA, 2, 128, dtype, window=window, softcap=softcap)
    results = []
    for count in (1, 2, 3, 5):
        with threads(count):
            results.append(attend(native, case))
    assert all(torch.equal(result, results[0]) for result in results)


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 330),
    before=st.integers(0, 600),
    cuts=st.sets(st.integers(1, 329), max_size=6),
    q_to_kv=st.sampled_from([(0,), (0, 0, 1), (1, 0, 1, 1, 0), GQA, (0,) * 20]),
    head_dim=st.sampled_from([8, 40, 64, 128]),
    dtype=st.sampled_from(TYPES),
    block_size=st.sampled_from([1, 16, 32]),
    window=st.none() | st.integers(1, 700),
    softcap=st.sampled_from([None, 2.0]),
    kv=CACHE_TYPES,
)
def test_rows_have_the_same_bits_in_any_chunks(
    queries: int,
    before: int,
    cuts: set[int],
    q_to_kv: tuple[int, ...],
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    window: int | None,
    softcap: float | None,
    kv: str,
) -> None:
    """A prompt behind `before` tokens of a prefix is computed at once, and cut into chunks at random places."""
    context = before + queries
    case = make_case([(queries, context)], q_to_kv, 2, head_dim, dtype, block_size, 0, window, softcap, kv)
    bounds = [0, *sorted(cut for cut in cuts if cut < queries), queries]
    for kernels in ATTENTION:
        chunks = [attend(kernels, chunk(case, first, end)) for first, end in itertools.pairwise(bounds)]
        assert torch.equal(torch.cat(chunks), attend(kernels, case))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (150, 5.0), (1000, None)])
def test_a_token_in_a_long_prompt_has_the_bits_of_a_decoded_one(
    native: NativeKernels, dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    case = make_case([(1300, 1300)], GQA, 2, 128, dtype, window=window, softcap=softcap)
    together = attend(native, case)
    for query in [0, 1, 2, 63, 64, 255, 256, 257, 700, 1023, 1024, 1298, 1299]:
        assert torch.equal(attend(native, chunk(case, query, query + 1))[0], together[query]), query


@needs_native
@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any),
    context=st.integers(24, 700),
    head_dim=st.sampled_from([8, 20, 32, 64, 96, 128, 160]),
    dtype=st.sampled_from(TYPES),
    window=st.none() | st.integers(1, 300),
    kv=CACHE_TYPES,
)
def test_few_rows_have_the_bits_that_they_have_among_many(
    groups: list[int], context: int, head_dim: int, dtype: torch.dtype, window: int | None, kv: str
) -> None:
    """Some kernels compute few rows of a KV head in another way than many."""
    q_to_kv = tuple(head for head, size in enumerate(groups) for _ in range(size))
    case = make_case([(24, context)], q_to_kv, len(groups), head_dim, dtype, window=window, kv=kv)
    for kernels in ATTENTION:
        together = attend(kernels, case)
        for first, end in ((0, 1), (9, 11), (23, 24)):
            assert torch.equal(attend(kernels, chunk(case, first, end)), together[first:end])


def test_large_scores_do_not_overflow(native: NativeKernels) -> None:
    case = make_case([(1, 600), (3, 40)], GQA, 2, 64)
    huge = replace(case, q=case.q * 300)
    out = attend(native, huge)
    # Scores of about 1000 have an error of up to 1000 * 2^-22, which is the relative error of the weights.
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
    window=st.none() | st.integers(1, 600),
    softcap=st.sampled_from([None, 1.0, 30.0]),
    kv=CACHE_TYPES,
)
def test_random_batches(
    lens: list[tuple[int, int]],
    q_to_kv: list[int],
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    seed: int,
    window: int | None,
    softcap: float | None,
    kv: str,
) -> None:
    ordered = sorted((queries, queries + before) for queries, before in lens)
    case = make_case(ordered, tuple(q_to_kv), 3, head_dim, dtype, block_size, seed, window, softcap, kv)
    every: list[Kernels] = [REFERENCE, *ATTENTION]
    for kernels in every:
        check(kernels, case)


@pytest.mark.parametrize(
    ("q_to_kv", "kv_heads", "equal"),
    [((0, 0, 1, 1), 2, True), ((0, 1), 2, True), ((0, 0, 1), 2, False), ((0, 1, 0, 1), 2, False), ((), 0, False)],
)
def test_equal_groups(q_to_kv: tuple[int, ...], kv_heads: int, equal: bool) -> None:
    assert has_equal_groups(make_case([(1, 1)], q_to_kv, kv_heads, 8).heads) is equal


def test_a_query_head_without_a_kv_head_is_refused(native: NativeKernels) -> None:
    case = make_case([(1, 4)], (0, 3), 2, 64)
    with pytest.raises(ValueError, match="without a KV head"):
        attend(native, case)
