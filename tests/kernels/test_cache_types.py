"""Tests of KV caches in another type than the activations. tests/kernels/test_attention.py has random ones, too."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import BOTH, NATIVE, REFERENCE, TYPES, needs_native, threads
from kernels.paged import alone, chunk, formula, make_batch, make_cache, make_case, rows_of_sequence
from shoal.kernels.base import HeadLayout, Kernels, KVCache
from shoal.kernels.kv_rows import KV_DTYPES, read_rows
from shoal.models.kv_format import KV_FORMATS
from support.example_counts import examples

SMALL = ["int8", "fp8_e4m3", "fp8_e5m2"]
HEADS = HeadLayout(2, 2, 40, (0, 1))


def test_the_table_of_sizes_is_that_of_the_tensors() -> None:
    assert list(KV_FORMATS) == list(KV_DTYPES)
    for name, each in KV_FORMATS.items():
        assert each.item_bytes == KV_DTYPES[name].itemsize
        cache = make_cache(1, 1, 24, name)
        scales = 0 if cache.key_scales is None else cache.key_scales.nbytes
        assert each.row_bytes(24) == cache.keys.nbytes + scales


def stored(kernels: Kernels, qkv: Tensor, kv: str) -> tuple[KVCache, Tensor]:
    """Return a cache with the keys and values of `qkv`, and the slots that they are in."""
    batch, slots = make_batch([(len(qkv), len(qkv))], 4, torch.Generator().manual_seed(0))
    cache = make_cache(slots, HEADS.kv_heads, HEADS.head_dim, kv)
    kernels.rotate_and_store(qkv, HEADS, None, None, batch, cache)
    return cache, batch.slots


def parts(cache: KVCache) -> list[Tensor]:
    return [each for each in (cache.keys, cache.values, cache.key_scales, cache.value_scales) if each is not None]


@needs_native
@settings(max_examples=examples(30), deadline=None)
@given(kv=st.sampled_from(list(KV_DTYPES)), dtype=st.sampled_from(TYPES), seed=st.integers(0, 9999))
def test_both_implementations_store_the_same_bits(kv: str, dtype: torch.dtype, seed: int) -> None:
    """Among the numbers are some beyond every range, subnormal ones, and rows of zeros."""
    assert NATIVE is not None
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-20, 18, (9, 1), generator=generator)
    qkv = (torch.randn(9, 6 * HEADS.head_dim, generator=generator) * 2.0**exponents).to(dtype)
    qkv[4] = 0
    (ours, _), (wanted, _) = (stored(kernels, qkv, kv) for kernels in (NATIVE, REFERENCE))
    for found, expected in zip(parts(ours), parts(wanted), strict=True):
        assert torch.equal(found.float().nan_to_num(nan=-1e30), expected.float().nan_to_num(nan=-1e30))


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("kv", SMALL)
def test_nan_stays_nan(kernels: Kernels, kv: str) -> None:
    """It shows in the output, as without rounding; other heads and tokens do not change."""
    qkv = torch.ones(3, 6 * HEADS.head_dim)
    qkv[1, -1] = torch.nan
    cache, slots = stored(kernels, qkv, kv)
    found = read_rows(cache.values, cache.value_scales, slots, torch.float32)
    assert found[1, 1, -1].isnan()
    found[1, 1] = found[0, 0]
    assert (found == found[0, 0, 0]).all()
    assert abs(found[0, 0, 0] - 1) < 2**-8


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("kv", SMALL)
def test_the_largest_error_of_a_number(kernels: Kernels, kv: str) -> None:
    """int8: half a step, which is 1/127 of the largest number of the row up to the rounding of the scale to bfloat16.

    FP8: half a unit of the mantissa.
    """
    qkv = torch.randn(50, 6 * HEADS.head_dim)
    cache, slots = stored(kernels, qkv, kv)
    found = read_rows(cache.values, cache.value_scales, slots, torch.float32)
    wanted = qkv.view(50, 6, HEADS.head_dim)[:, 4:]
    error = (found - wanted).abs()
    if kv == "int8":
        # A scale that was rounded down leaves the largest number beyond 127 steps, by 2^-9 of it at most.
        assert (error <= wanted.abs().amax(-1, keepdim=True) * (0.5 / 127 * (1 + 2.0**-8) + 2.0**-24)).all()
    else:
        info = torch.finfo(KV_DTYPES[kv])
        assert (error <= (wanted.abs() * info.eps / 2).clamp(min=info.smallest_normal * info.eps / 2)).all()


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kv", SMALL)
def test_every_code_is_read_right(kernels: Kernels, dtype: torch.dtype, kv: str) -> None:
    """The only token of a text has the weight 1, so the output is its value."""
    case = make_case([(1, 1)], (0,), 1, 256, dtype, kv=kv)
    codes = torch.arange(256, dtype=torch.uint8).view(KV_DTYPES[kv])
    case.cache.values[case.batch.slots] = codes
    if case.cache.value_scales is not None:
        case.cache.value_scales[case.batch.slots] = 0.5
    numbers = codes.float() * (0.5 if kv == "int8" else 1)
    readable = numbers.isfinite() & (numbers != -64)  # the code -128 is never stored
    found = kernels.attend(case.q, case.heads, case.params, case.batch, case.cache)[0]
    assert torch.equal(found.float()[readable], numbers[readable])


@needs_native
@pytest.mark.parametrize("kv", SMALL)
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_have_the_same_bits_in_any_batch_and_with_any_threads(dtype: torch.dtype, kv: str) -> None:
    assert NATIVE is not None
    lens = [(1, 160), (1, 256), (1, 900), (2, 40), (8, 700), (9, 50), (40, 120)]
    case = make_case(lens, (0, 0, 1, 1, 2, 2), 3, 96, dtype, window=500, softcap=5.0, kv=kv)
    together = NATIVE.attend(case.q, case.heads, case.params, case.batch, case.cache)
    for i in range(len(lens)):
        own = alone(case, i)
        with threads(1 + i % 3):
            found = NATIVE.attend(own.q, own.heads, own.params, own.batch, own.cache)
        assert torch.equal(found, together[rows_of_sequence(case, i)]), lens[i]


@needs_native
@pytest.mark.parametrize("kv", SMALL)
def test_a_token_in_a_prompt_has_the_bits_of_a_decoded_one(kv: str) -> None:
    assert NATIVE is not None
    case = make_case([(600, 600)], (0, 0, 1, 1), 2, 64, torch.bfloat16, kv=kv)
    together = NATIVE.attend(case.q, case.heads, case.params, case.batch, case.cache)
    for query in (0, 1, 63, 64, 255, 256, 257, 599):
        own = chunk(case, query, query + 1)
        found = NATIVE.attend(own.q, own.heads, own.params, own.batch, own.cache)
        assert torch.equal(found[0], together[query]), query


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("kv", SMALL)
def test_values_that_are_the_keys(kernels: Kernels, kv: str) -> None:
    """Latent attention has such a cache, with one scale for each token."""
    case = make_case([(1, 300), (3, 270), (20, 60)], (0,) * 11, 1, 576, torch.float32, kv=kv)
    shared = KVCache(case.cache.keys, case.cache.keys, case.cache.key_scales, case.cache.key_scales)
    case = replace(case, cache=shared)
    wanted, size = formula(case)
    found = kernels.attend(case.q, case.heads, case.params, case.batch, case.cache)
    # Scores are below 8 here, and their float32 error is a few times 2^-23; that is the relative error of a weight.
    assert ((found.double() - wanted).abs() <= size * 5e-6).all()
