"""Tests of linear layers with int8 weights: both implementations give the same bits, those of exact arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.int8_linear import NativeInt8Linear, TorchInt8Linear
from shoal.kernels.linear import Linear, make_linear
from shoal.kernels.linear_weights import LinearWeights, quantize_int8, quantize_rows
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.weight_format import INT8, padded_outputs
from support.example_counts import examples

TYPES = [torch.float32, torch.bfloat16, torch.float16]
LIBRARY, WHY = load_quantized()
LEVELS = () if LIBRARY is None else LIBRARY.levels
needs_native = pytest.mark.skipif(LIBRARY is None, reason=WHY)


def random_layer(outputs: int, inputs: int, dtype: torch.dtype, bias: bool) -> tuple[LinearWeights, Tensor | None]:
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    return quantize_int8(weight), torch.randn(outputs).to(dtype) if bias else None


def natives(weight: LinearWeights, bias: Tensor | None) -> list[NativeInt8Linear]:
    assert LIBRARY is not None
    return [NativeInt8Linear(weight, bias, LIBRARY, level) for level in LEVELS]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def exact(weight: LinearWeights, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the result by its definition: sums of integers in float64, which holds them exactly, then the scales."""
    codes, scales = quantize_rows(x)
    out = (codes.double() @ weight.codes.double().T).float() * scales * weight.scales.flatten()
    return (out if bias is None else out + bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_results_are_those_of_exact_arithmetic(dtype: torch.dtype, bias: bool) -> None:
    for outputs, inputs in ((1, 16), (5, 17), (64, 64), (333, 777), (40, 3072)):
        weight, b = random_layer(outputs, inputs, dtype, bias)
        x = torch.randn(9, inputs).to(dtype)
        assert same_bits(TorchInt8Linear(weight, b)(x), exact(weight, b, x))


@needs_native
@settings(max_examples=examples(60), deadline=None)
@given(
    rows=st.integers(0, 110),
    outputs=st.integers(1, 200),
    inputs=st.integers(16, 300),
    dtype=st.sampled_from(TYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_implementations_give_the_same_bits(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, b = random_layer(outputs, inputs, dtype, bias)
    x = torch.randn(rows, inputs).to(dtype)
    x[rows // 2 :] *= 1e-30  # too small for codes in most types
    wanted = TorchInt8Linear(weight, b)(x)
    assert all(same_bits(native(x), wanted) for native in natives(weight, b))


@needs_native
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(17, 100), (129, 33), (1024, 256), (8192, 40)])
def test_rows_have_the_same_bits_in_any_batch(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    weight, bias = random_layer(outputs, inputs, dtype, bias=True)
    x = torch.randn(300, inputs).to(dtype)
    linears: list[Linear] = [*natives(weight, bias), TorchInt8Linear(weight, bias)]
    for linear in linears:
        together = linear(x)
        counts = (1, 2, 5, 6, 7, 12, 13, 32, 33, 95, 96, 97, 193)
        assert [rows for rows in counts if not torch.equal(linear(x[:rows]), together[:rows])] == []
        assert torch.equal(linear(x[299:]), together[299:])


@needs_native
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_every_number_of_rows_and_blocks_of_a_tile(blocks: int) -> None:
    weight, bias = random_layer(16 * blocks, 150, torch.bfloat16, bias=True)
    x = torch.randn(6, 150).bfloat16()
    wanted = TorchInt8Linear(weight, bias)(x)
    for native in natives(weight, bias):
        assert [rows for rows in range(1, 7) if not same_bits(native(x[:rows]), wanted[:rows])] == []


@needs_native
@pytest.mark.parametrize("dtype", TYPES)
def test_the_largest_sums(dtype: torch.dtype) -> None:
    """A sum of products that are all as large as can be fits into its integer."""
    inputs = 1 << 17
    assert INT8.takes((2, inputs))
    assert not INT8.takes((2, inputs + 1))
    weight = quantize_int8(torch.stack([torch.ones(inputs), -torch.ones(inputs)]))
    x = torch.ones(2, inputs, dtype=dtype) * 0.5
    wanted = exact(weight, None, x)
    assert wanted[0, 0] > 0 > wanted[0, 1]
    assert all(same_bits(linear(x), wanted) for linear in natives(weight, None))


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_that_are_not_finite_spoil_their_row_only(dtype: torch.dtype) -> None:
    weight, bias = random_layer(40, 70, dtype, bias=True)
    x = torch.randn(5, 70).to(dtype)
    before = make_linear(weight, bias)(x)
    x[1, 3], x[3, 69] = torch.nan, -torch.inf
    linears: list[Linear] = [*(natives(weight, bias) if LIBRARY else ()), TorchInt8Linear(weight, bias)]
    for linear in linears:
        out = linear(x)
        assert out[[1, 3]].isnan().all()
        assert torch.equal(out[[0, 2, 4]], before[[0, 2, 4]])


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_zeros(dtype: torch.dtype) -> None:
    weight, bias = random_layer(9, 20, dtype, bias=True)
    assert bias is not None
    assert torch.equal(make_linear(weight, bias)(torch.zeros(3, 20, dtype=dtype)), bias.expand(3, 9))
    nothing = quantize_int8(torch.zeros(9, 20, dtype=dtype))
    assert torch.equal(make_linear(nothing, None)(torch.ones(3, 20, dtype=dtype)), torch.zeros(3, 9, dtype=dtype))


@settings(max_examples=examples(60), deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), exponent=st.integers(-60, 60), seed=st.integers(0, 1000))
def test_codes_are_the_nearest(rows: int, columns: int, exponent: int, seed: int) -> None:
    """The error of a number is half a code at most, and the largest number of each row has the largest code."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weight = quantize_int8(x)
    scales = weight.scales
    # The inverse of the scale and the product with it are rounded: codes of up to 127 move by less than 127 * 2^-23.
    assert ((weight.dequantized() - x).abs() <= scales * (0.5 + 127 * 2.0**-22)).all()
    assert (weight.codes.abs().amax(1) == 127).all()
    assert torch.equal(weight.codes.sign() * x.sign().to(torch.int8), weight.codes.abs().clamp(max=1))


@pytest.mark.parametrize("dtype", TYPES)
def test_the_error_is_that_of_the_codes(dtype: torch.dtype) -> None:
    """An output differs from that of the plain weight by at most half a code for each number of both factors."""
    inputs = 333
    plain, x = (torch.randn(50, inputs) / inputs**0.5).to(dtype), torch.randn(20, inputs).to(dtype)
    weight = quantize_int8(plain)
    out = make_linear(weight, None)(x).double()
    wanted = x.double() @ plain.double().T
    of_rows, of_outputs = x.double().abs().amax(1, keepdim=True) / 254, weight.scales.double().T / 2
    bound = of_rows * plain.double().abs().sum(1) + of_outputs * x.double().abs().sum(1, keepdim=True)
    bound += of_rows * of_outputs * inputs + wanted.abs() * float(torch.finfo(dtype).eps) + 1e-5
    assert ((out - wanted).abs() <= bound).all()
    assert float((out - wanted).norm() / wanted.norm()) < 0.02  # 1 / 127 for each factor, and more is an error


def test_the_weight_and_rows_in_other_layouts() -> None:
    """The weight may change after it was packed, and rows need not be contiguous."""
    weight, _ = random_layer(32, 48, torch.float32, bias=False)
    linear, x = make_linear(weight, None), torch.randn(4, 48)
    before = linear(x)
    wide = torch.zeros(4, 96)
    wide[:, ::2] = x
    assert torch.equal(linear(wide[:, ::2]), before)
    if isinstance(linear, NativeInt8Linear):
        weight.codes.zero_()
        weight.scales.zero_()
        assert torch.equal(linear(x), before)


def test_the_bytes_of_a_weight() -> None:
    assert INT8.weight_bytes((64, 1024)) == INT8.packed_bytes((64, 1024)) + 8 * 64 == 64 * 1024 + 8 * 64
    assert INT8.weight_bytes((65, 1023)) == INT8.packed_bytes((65, 1023)) + 8 * padded_outputs(65) == 80 * 1024 + 8 * 80
    assert (INT8.row_bytes(64), INT8.row_bytes(65)) == (132, 260)
    assert [INT8.takes(shape) for shape in ((1, 16), (1, 15), (0, 64), (64,), (64, 0))] == [True] + [False] * 4
