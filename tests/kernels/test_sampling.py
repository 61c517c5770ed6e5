"""Tests of the native sampling kernels against PyTorch's: equal tokens and values, and sums equal to a few units."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels import sampling as module
from shoal.kernels.gumbel_noise import gumbel
from shoal.kernels.sampling import TorchSampling, load_native, pack_tokens, sampling_kernels, unpack_tokens
from support.fakes import steady

NATIVE, WHY = load_native()
TORCH = TorchSampling()
MINUS_INF = float("-inf")
SIZES = [1, 15, 16, 63, 64, 65, 1000, 4097]  # around the sizes of a vector and a group, and larger
needs_native = pytest.mark.skipif(NATIVE is None, reason=WHY)


def logits_of(kind: str, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=generator) * 3
    if kind == "equal":
        x = x.round()
    if kind == "half":
        x = x.bfloat16().float()
    if kind == "holes":
        x[torch.rand(rows, columns, generator=generator) < 0.7] = MINUS_INF
    if kind == "zeros":
        x = torch.where(x > 0, 0.0, -0.0)
    if kind == "nothing":
        x = torch.full_like(x, MINUS_INF)
    return x


KINDS = ["normal", "equal", "half", "holes", "zeros", "nothing"]


def keys_for(rows: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, 2), generator=torch.Generator().manual_seed(rows)).int()


@settings(steady, max_examples=200)
@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 2**31 - 1)), min_size=2, max_size=8))
def test_packed_tokens_have_the_order_of_tokens(tokens: list[tuple[float, int]]) -> None:
    values = torch.tensor([value for value, _ in tokens])
    ids = torch.tensor([i for _, i in tokens])
    packed = pack_tokens(values, ids)
    expected = sorted(tokens, key=lambda token: (-token[0], token[1]))
    found = [tokens[i] for i in packed.argsort(descending=True, stable=True).tolist()]
    assert found == expected
    back, back_ids = unpack_tokens(packed)
    assert torch.equal(back, values)
    assert torch.equal(back_ids, ids)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", SIZES)
def test_top_tokens(kind: str, columns: int) -> None:
    assert NATIVE is not None
    logits = logits_of(kind, 6, columns)
    rows = torch.tensor([4, 0, 5])
    for count in {1, min(columns, 20), min(columns, 500), columns, columns + 9}:
        assert torch.equal(NATIVE.top(logits, 77, rows, count), TORCH.top(logits, 77, rows, count))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [*SIZES, 1023, 1025])
def test_likeliest_tokens(kind: str, columns: int, dtype: torch.dtype) -> None:
    """Threads share rows, or the columns of the only row; in the type with fewer bits, many logits are equal."""
    assert NATIVE is not None
    before = torch.get_num_threads()
    logits = logits_of(kind, 6, columns + 2).to(dtype)[:, 2:]
    try:
        for rows, threads in [(6, 2), (1, 3), (0, 2)]:
            torch.set_num_threads(threads)
            value, ids = NATIVE.argmax(logits[:rows], 77)
            expected, expected_ids = TORCH.argmax(logits[:rows], 77)
            assert torch.equal(value, expected)
            assert torch.equal(ids, expected_ids)
            assert (value.dtype, ids.dtype) == (torch.float32, torch.int64)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("limited", [False, True])
def test_draws(kind: str, columns: int, limited: bool) -> None:
    assert NATIVE is not None
    logits, count = logits_of(kind, 40, columns), 40
    rows = torch.arange(count).flip(0)
    temperature = torch.tensor([1.0, 0.7, 3.0, 1e-5] * 10)
    limits = pack_tokens(logits[rows, columns // 2], torch.full((count,), 5 + columns // 2)) if limited else None
    score, ids = NATIVE.draw(logits, 5, rows, temperature, keys_for(count), limits)
    expected, expected_ids = TORCH.draw(logits, 5, rows, temperature, keys_for(count), limits)
    assert torch.equal(score, expected)
    assert torch.equal(ids, expected_ids)


@needs_native
def test_draws_over_a_large_vocabulary() -> None:
    """With 40 000 nearly equal logits the noise decides, which tests every bound of the search."""
    assert NATIVE is not None
    logits = torch.randn(64, 40_000, generator=torch.Generator().manual_seed(3)) * 0.1
    rows, temperature = torch.arange(64), torch.ones(64)
    score, ids = NATIVE.draw(logits, 0, rows, temperature, keys_for(64))
    expected = logits + gumbel(keys_for(64), torch.arange(40_000, dtype=torch.int32))
    assert torch.equal(ids, expected.argmax(1))
    assert torch.equal(score, expected.amax(1))


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("limited", [False, True])
def test_sums(kind: str, columns: int, limited: bool) -> None:
    """The results are float32 numbers up to 15, summed in two orders: 4e-6 is four units in the last place."""
    assert NATIVE is not None
    logits = logits_of(kind, 6, columns)
    rows, temperature = torch.tensor([3, 1, 0]), torch.tensor([1.0, 0.7, 3.0])
    limits = pack_tokens(logits[rows, columns // 2], torch.full((3,), 9 + columns // 2)) if limited else None
    for floor in (torch.full((3,), MINUS_INF), torch.tensor([-1.0, 0.5, 0.0])):
        found = NATIVE.logsumexp(logits, 9, rows, temperature, floor, limits)
        expected = TORCH.logsumexp(logits, 9, rows, temperature, floor, limits)
        torch.testing.assert_close(found, expected, rtol=4e-7, atol=4e-6)


@needs_native
@pytest.mark.parametrize("columns", SIZES)
def test_counts(columns: int) -> None:
    assert NATIVE is not None
    for kind in KINDS:
        logits = logits_of(kind, 6, columns)
        values = logits[:, columns // 2].contiguous()
        assert torch.equal(NATIVE.count_above(logits, values), TORCH.count_above(logits, values))


@needs_native
@pytest.mark.parametrize("start", [0, 32, 7, 1000])
@pytest.mark.parametrize("columns", [*SIZES, 0])
def test_masks(columns: int, start: int) -> None:
    assert NATIVE is not None
    generator = torch.Generator().manual_seed(columns)
    bits = torch.randint(-(2**31), 2**31, (3, 60), generator=generator).int()
    bits[torch.rand(bits.shape, generator=generator) < 0.3] = 0
    bits[torch.rand(bits.shape, generator=generator) < 0.3] = -1
    native = torch.randn(5, columns, generator=generator)
    plain = native.clone()
    NATIVE.apply_masks(native, start, torch.tensor([4, 1, 0]), bits)
    TORCH.apply_masks(plain, start, torch.tensor([4, 1, 0]), bits)
    assert torch.equal(native, plain)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_does_not_depend_on_other_rows_or_on_threads(threads: int) -> None:
    assert NATIVE is not None
    logits, keys = logits_of("normal", 9, 3000), keys_for(9)
    rows, temperature, floor = torch.arange(9), torch.full((9,), 0.9), torch.full((9,), MINUS_INF)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = (
            NATIVE.top(logits, 0, rows, 50),
            NATIVE.logsumexp(logits, 0, rows, temperature, floor),
            *NATIVE.draw(logits, 0, rows, temperature, keys),
        )
    finally:
        torch.set_num_threads(before)
    for row in range(9):
        one = slice(row, row + 1)
        alone = (
            NATIVE.top(logits[one], 0, rows[:1], 50),
            NATIVE.logsumexp(logits[one], 0, rows[:1], temperature[:1], floor[:1]),
            *NATIVE.draw(logits[one], 0, rows[:1], temperature[:1], keys[one]),
        )
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


@needs_native
def test_shares_are_views_of_wider_rows() -> None:
    """The stride of the rows may be larger than their length."""
    assert NATIVE is not None
    part = logits_of("normal", 4, 300)[:, 50:170]
    rows = torch.arange(4)
    assert torch.equal(NATIVE.top(part, 0, rows, 9), TORCH.top(part, 0, rows, 9))
    assert torch.equal(NATIVE.count_above(part, part[:, 3]), TORCH.count_above(part, part[:, 3]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_logits_go_to_pytorch(dtype: torch.dtype) -> None:
    assert isinstance(sampling_kernels(torch.zeros(2, 3, dtype=dtype)), TorchSampling)
    assert isinstance(sampling_kernels(torch.zeros(3, 2).T), TorchSampling)


def test_a_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "sampling.py"))
    assert load_native() == (None, "_sampling is not built")


@needs_native
def test_a_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABI_VERSION", module.ABI_VERSION + 1)
    native, reason = load_native()
    assert native is None
    assert "stale" in reason


@pytest.mark.parametrize("suffix", EXTENSION_SUFFIXES[:1])
def test_a_broken_library_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"_sampling{suffix}").write_bytes(b"not a library")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "sampling.py"))
    native, reason = load_native()
    assert native is None
    assert "cannot be loaded" in reason
