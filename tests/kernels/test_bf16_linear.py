"""Tests of our own bfloat16 linear layers, with each set of instructions that the CPU has."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import threads
from kernels.test_linear import cancelling
from shoal.kernels import bf16_linear as module
from shoal.kernels.bf16_linear import NativeBf16Group, NativeBf16Linear, load_bf16
from shoal.kernels.linear import PackedLinear, PlainLinear, make_head_linear, make_linear
from support.example_counts import examples

LIBRARY, WHY = load_bf16()
LEVELS = () if LIBRARY is None else LIBRARY.levels
needs_native = pytest.mark.skipif(LIBRARY is None, reason=WHY)
# Around the sizes of tiles (6, 12 and 32 rows), of chunks (85 to 256 rows) and beyond.
COUNTS = (*range(1, 8), 11, 12, 13, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 97, 127, 129, 160, 255, 256, 257, 300)


def natives(weight: Tensor, bias: Tensor | None = None) -> list[NativeBf16Linear]:
    assert LIBRARY is not None
    return [NativeBf16Linear(weight, bias, LIBRARY, level) for level in LEVELS]


def within_bounds(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether results are as near to those of float64 as sums in float32, rounded once, must be.

    Products of bfloat16 numbers are exact in float32. Each of the additions, one for each input and one for the bias,
    has an error of half a unit of a sum, which is not larger than the sum of the absolute values.
    """
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    additions = x.shape[1] + 1
    # 2^-8: half a unit of bfloat16. 2^-126: subnormal numbers may count as 0, as terms and as a result.
    bound = (wanted.abs() + size * additions * 2.0**-24) * 2.0**-8 + size * additions * 2.0**-24
    return bool(((out.double() - wanted).abs() <= bound + (additions + 1) * 2.0**-126).all())


@needs_native
@settings(max_examples=examples(60), deadline=None)
@given(
    rows=st.integers(0, 110),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 200),
    bias=st.booleans(),
    exponent=st.integers(-40, 40),
    seed=st.integers(0, 1000),
)
def test_products_are_as_exact_as_sums_in_float32(
    rows: int, outputs: int, inputs: int, bias: bool, exponent: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(outputs, inputs) * 2.0**exponent).bfloat16()
    x = torch.randn(rows, inputs).bfloat16()
    b = (torch.randn(outputs) * 2.0**exponent).bfloat16() if bias else None
    for linear in natives(weight, b):
        out = linear(x)
        assert out.dtype == torch.bfloat16
        assert out.shape == (rows, outputs)
        assert within_bounds(out, x, weight, b)


@needs_native
@pytest.mark.parametrize("inputs", [1, 31, 32, 33, 1024, 1030, 3072])
def test_one_product_alone(inputs: int) -> None:
    """Every weight is where its input and its output are: a matrix with a single number gives this number."""
    for output, place in ((0, 0), (16, inputs // 2), (32, inputs - 1), (36, inputs - 1)):
        weight, x = torch.zeros(37, inputs).bfloat16(), torch.zeros(40, inputs).bfloat16()
        weight[output, place] = 3.0
        x[:, place] = torch.arange(40).bfloat16()
        wanted = torch.zeros(40, 37)
        wanted[:, output] = 3.0 * torch.arange(40)
        assert all(torch.equal(linear(x).float(), wanted) for linear in natives(weight))


@needs_native
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 5), (40, 130), (100, 17), (777, 33), (1024, 160), (1026, 64), (3072, 48), (8192, 40)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_rows_have_the_same_bits_in_any_batch(inputs: int, outputs: int, bias: bool) -> None:
    x, weight = cancelling(520, outputs, inputs, torch.bfloat16)
    for linear in natives(weight, torch.randn(outputs).bfloat16() if bias else None):
        together = linear(x)
        assert [rows for rows in COUNTS if not torch.equal(linear(x[:rows]), together[:rows])] == []
        assert [row for row in (1, 11, 12, 31, 32, 255, 519) if not torch.equal(linear(x[row:]), together[row:])] == []


@needs_native
@pytest.mark.parametrize("rows", [1, 13, 70, 400])
def test_threads_do_not_change_bits(rows: int) -> None:
    x, weight = cancelling(rows, 600, 1056, torch.bfloat16)
    for linear in natives(weight):
        with threads(1):
            alone = linear(x)
        for count in (2, 3, 7):
            with threads(count):
                assert torch.equal(linear(x), alone)


@needs_native
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("inputs", [50, 64])
def test_numbers_that_are_not_finite(rows: int, inputs: int) -> None:
    """They affect the results that have them as a term, and no others."""
    weight = torch.randn(40, inputs).bfloat16()
    x = torch.randn(rows + 2, inputs).bfloat16()
    weight[:, 3] = weight[:, 3].abs() + 1
    before = [linear(x) for linear in natives(weight)]
    x[rows, inputs - 1], x[rows + 1, 3] = torch.nan, torch.inf
    weight[7, 5] = torch.nan
    for linear, finite in zip(natives(weight), before, strict=True):
        out = linear(x)
        assert out[rows].isnan().all()
        assert out[:, 7].isnan().all()
        others = [output for output in range(40) if output != 7]
        assert (out[rows + 1, others] == torch.inf).all()
        assert torch.equal(out[:rows, others], finite[:rows, others])


@needs_native
def test_results_are_rounded_to_the_nearest_even() -> None:
    """1 + 2^-8 lies between two numbers of bfloat16, 1 and 1 + 2^-7; a little more or less decides."""
    terms = [(1.0, 2.0**-8, 0.0), (1.0, 2.0**-8, 2.0**-20), (1.0, 3 * 2.0**-8, 0.0), (1.0, 3 * 2.0**-8, -(2.0**-20))]
    x = torch.tensor(terms).bfloat16()
    wanted = torch.tensor([1.0, 1 + 2.0**-7, 1 + 2.0**-6, 1 + 2.0**-7]).unsqueeze(1)
    assert all(torch.equal(linear(x).float(), wanted) for linear in natives(torch.ones(1, 3).bfloat16()))
    # The bias is added before the result is rounded.
    bias = torch.tensor([2.0**-8]).bfloat16()
    x = torch.tensor([[1.0, 2.0**-20]]).bfloat16()
    assert all(linear(x).item() == 1 + 2.0**-7 for linear in natives(torch.ones(1, 2).bfloat16(), bias))


@needs_native
def test_subnormal_numbers_keep_their_values_with_avx2() -> None:
    assert LIBRARY is not None
    weight, x = torch.full((3, 4), 2.0**-131).bfloat16(), torch.ones(2, 4).bfloat16()
    out = NativeBf16Linear(weight, None, LIBRARY, "avx2")(x)
    assert torch.equal(out.double(), torch.full((2, 3), 2.0**-129, dtype=torch.float64))


@needs_native
def test_weights_and_rows_in_other_layouts() -> None:
    """The weight may change after it was packed; neither it nor rows need be contiguous."""
    weight, x = torch.randn(48, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    wide = torch.zeros(4, 64).bfloat16()
    wide[:, ::2] = x
    for linear, strided in zip(natives(weight), natives(weight.t().contiguous().t()), strict=True):
        before = linear(x)
        assert torch.equal(strided(x), before)
        assert torch.equal(linear(wide[:, ::2]), before)
    linears = natives(weight)
    before = linears[0](x)
    weight.zero_()
    assert torch.equal(linears[0](x), before)


@needs_native
def test_rows_of_another_width_or_type_are_refused() -> None:
    linear = natives(torch.zeros(4, 8).bfloat16())[0]
    with pytest.raises(ValueError, match=r"\[2, 9\] in torch.bfloat16 for a linear layer with 8 bfloat16 inputs"):
        linear(torch.zeros(2, 9).bfloat16())
    with pytest.raises(ValueError, match=r"\[2, 8\] in torch.float32"):
        linear(torch.zeros(2, 8))


@needs_native
def test_a_weight_has_one_packed_copy() -> None:
    """Its size is that of the weight, with outputs in sixteens and inputs in steps of 32."""
    for shape, size in (((1024, 3072), 1024 * 3072), ((17, 33), 32 * 64)):
        linear = natives(torch.zeros(shape).bfloat16())[0]
        held = [value for value in vars(linear).values() if isinstance(value, Tensor)]
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 2 * size


@needs_native
@settings(max_examples=examples(40), deadline=None)
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    outputs=st.integers(1, 150),
    inputs=st.integers(1, 100),
    count=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_group_gives_the_rows_of_its_layers(
    counts: list[int], outputs: int, inputs: int, count: int, seed: int
) -> None:
    """Each row has the bits that its layer alone gives it, with any number of threads."""
    torch.manual_seed(seed)
    made = [natives(torch.randn(outputs, inputs).bfloat16(), torch.randn(outputs).bfloat16()) for _ in counts]
    x = torch.randn(sum(counts), inputs).bfloat16()
    for layers in zip(*made, strict=True):
        with threads(count):
            out = NativeBf16Group(layers)(x, counts)
        parts = zip(layers, out.split(counts), x.split(counts), strict=True)
        assert out.shape == (sum(counts), outputs)
        assert all(torch.equal(part, layer(rows)) for layer, part, rows in parts)


@needs_native
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_group_with_more_work_than_one_thread_takes(count: int) -> None:
    counts = [3, 0, 300, 1, 40]
    for level in range(len(LEVELS)):
        layers = [natives(torch.randn(600, 320).bfloat16())[level] for _ in counts]
        x = torch.randn(sum(counts), 320).bfloat16()
        with threads(count):
            out = NativeBf16Group(layers)(x, counts)
        assert torch.equal(out, torch.cat([layer(rows) for layer, rows in zip(layers, x.split(counts), strict=True)]))


@needs_native
def test_a_group_refuses_counts_that_do_not_fit() -> None:
    group = NativeBf16Group([natives(torch.zeros(4, 8).bfloat16())[0] for _ in range(3)])
    with pytest.raises(ValueError, match="5 rows in 3 parts of 6 for 3 layers"):
        group(torch.zeros(5, 8).bfloat16(), [1, 2, 3])
    with pytest.raises(ValueError, match="5 rows in 2 parts of 5 for 3 layers"):
        group(torch.zeros(5, 8).bfloat16(), [2, 3])


@needs_native
def test_bfloat16_layers_are_ours() -> None:
    weight = torch.randn(3, 24, 40)
    assert isinstance(make_linear(weight[0].bfloat16(), None), NativeBf16Linear)
    assert isinstance(make_linear(weight[0], None), PackedLinear | PlainLinear)
    heads, x = make_head_linear(weight.bfloat16()), torch.randn(5, 3, 40).bfloat16()
    wanted = torch.stack([make_linear(each.bfloat16(), None)(x[:, i]) for i, each in enumerate(weight)], 1)
    assert torch.equal(heads(x), wanted)


def test_without_the_library_onednn_or_pytorch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weight, x = torch.randn(20, 30).bfloat16(), torch.randn(3, 30).bfloat16()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "bf16_linear.py"))
    load_bf16.cache_clear()
    try:
        assert load_bf16() == (None, "_bf16 is not built")
        linear = make_linear(weight, None)
        assert isinstance(linear, PackedLinear | PlainLinear)
        assert within_bounds(linear(x), x, weight, None)
    finally:
        load_bf16.cache_clear()


@needs_native
def test_a_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABI_VERSION", module.ABI_VERSION + 1)
    load_bf16.cache_clear()
    try:
        library, reason = load_bf16()
    finally:
        load_bf16.cache_clear()
    assert library is None
    assert "stale" in reason
