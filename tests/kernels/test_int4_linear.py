"""Tests of linear layers with weights of 4 bits: both implementations give the same bits, those of their definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import threads
from shoal.kernels.int4_linear import NativeInt4Linear, TorchInt4Linear
from shoal.kernels.linear import Linear, make_linear
from shoal.kernels.linear_weights import LinearWeights, quantize_rows
from shoal.kernels.quantized import quantize_weight
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.weight_format import INT4, QUANTIZATIONS, WeightFormat
from support.example_counts import examples

TYPES = [torch.float32, torch.bfloat16, torch.float16]
LIBRARY, WHY = load_quantized()
LEVELS = () if LIBRARY is None else LIBRARY.levels
needs_native = pytest.mark.skipif(LIBRARY is None, reason=WHY)
FORMATS = [*INT4.values(), WeightFormat("int4, groups of 48", bits=4, group=48, beside=4)]


def random_layer(
    outputs: int, inputs: int, dtype: torch.dtype, bias: bool, kept_in: WeightFormat
) -> tuple[LinearWeights, Tensor | None]:
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    return quantize_weight(weight, kept_in), torch.randn(outputs).to(dtype) if bias else None


def natives(weight: LinearWeights, bias: Tensor | None) -> list[NativeInt4Linear]:
    return [] if LIBRARY is None else [NativeInt4Linear(weight, bias, LIBRARY, level) for level in LEVELS]


def linears(weight: LinearWeights, bias: Tensor | None) -> list[Linear]:
    return [*natives(weight, bias), TorchInt4Linear(weight, bias)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def exact(weight: LinearWeights, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the result by its definition: a group's sum in float64, which holds it exactly, then the rounded steps."""
    assert weight.zeros is not None
    assert weight.format.group is not None
    out = torch.zeros(len(x), len(weight.codes))
    for g, first in enumerate(range(0, x.shape[1], weight.format.group)):
        inputs = slice(first, first + weight.format.group)
        codes, scales = quantize_rows(x[:, inputs])
        sums = codes.double() @ (weight.codes[:, inputs] - weight.zeros[:, g : g + 1]).double().T
        out = out + sums.float() * weight.scales[:, g] * scales
    return (out if bias is None else out + bias.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_results_are_those_of_the_definition(dtype: torch.dtype, bias: bool) -> None:
    shapes = ((1, 16), (5, 17), (64, 64), (70, 129), (333, 777), (40, 3072))
    for kept_in, (outputs, inputs) in zip(FORMATS * 2, shapes, strict=False):
        weight, b = random_layer(outputs, inputs, dtype, bias, kept_in)
        x = torch.randn(9, inputs).to(dtype)
        assert same_bits(TorchInt4Linear(weight, b)(x), exact(weight, b, x))


@needs_native
@settings(max_examples=examples(40), deadline=None)
@given(
    rows=st.integers(0, 110),
    outputs=st.integers(1, 200),
    inputs=st.integers(16, 400),
    kept_in=st.sampled_from(FORMATS),
    dtype=st.sampled_from(TYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_implementations_give_the_same_bits(
    rows: int, outputs: int, inputs: int, kept_in: WeightFormat, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, b = random_layer(outputs, inputs, dtype, bias, kept_in)
    x = torch.randn(rows, inputs).to(dtype)
    x[rows // 2 :] *= 1e-30  # too small for codes in most types
    wanted = TorchInt4Linear(weight, b)(x)
    assert all(same_bits(native(x), wanted) for native in natives(weight, b))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(17, 100), (129, 33), (1024, 256), (2048, 40)])
def test_rows_have_the_same_bits_in_any_batch(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    weight, bias = random_layer(outputs, inputs, dtype, True, INT4[128])
    x = torch.randn(300, inputs).to(dtype)
    for linear in linears(weight, bias):
        together = linear(x)
        counts = (1, 33) if isinstance(linear, TorchInt4Linear) else (1, 2, 5, 6, 7, 12, 13, 32, 33, 95, 96, 97, 193)
        assert [rows for rows in counts if not torch.equal(linear(x[:rows]), together[:rows])] == []
        assert torch.equal(linear(x[299:]), together[299:])


@needs_native
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_every_number_of_rows_and_blocks_of_a_tile(blocks: int) -> None:
    """With up to 6 rows weights are unpacked as they are read; with more, once for several tiles of 3 to 6 rows."""
    weight, bias = random_layer(16 * blocks, 150, torch.bfloat16, True, INT4[64])
    x = torch.randn(12, 150).bfloat16()
    wanted = TorchInt4Linear(weight, bias)(x)
    for native in natives(weight, bias):
        assert [rows for rows in range(1, 13) if not same_bits(native(x[:rows]), wanted[:rows])] == []


def test_threads_change_no_bit() -> None:
    weight, bias = random_layer(1000, 500, torch.float32, True, INT4[64])
    linear, x = make_linear(weight, bias), torch.randn(40, 500)
    before = linear(x)
    for count in (1, 3):
        with threads(count):
            assert torch.equal(linear(x), before)


def test_the_largest_sums() -> None:
    """Products that are all as large as can be have a sum that is exact, also with the largest zero."""
    inputs = 256
    for code, zero in ((15, 0), (0, 15), (15, 15)):
        codes = torch.full((3, inputs), code, dtype=torch.int8)
        weight = LinearWeights(INT4[128], codes, torch.ones(3, 2), torch.full((3, 2), zero, dtype=torch.int8))
        x = torch.stack([torch.ones(inputs), -torch.ones(inputs)])
        wanted = (code - zero) * inputs * x[:, :1].expand(2, 3)
        for linear in linears(weight, None):
            # Beside the sum, only the scale of the row is rounded: (1 / 127) * 127.
            assert torch.allclose(linear(x), wanted, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_that_are_not_finite_spoil_their_row_only(dtype: torch.dtype) -> None:
    weight, bias = random_layer(40, 270, dtype, True, INT4[128])
    x = torch.randn(5, 270).to(dtype)
    before = make_linear(weight, bias)(x)
    x[1, 3], x[3, 269] = torch.nan, -torch.inf
    for linear in linears(weight, bias):
        out = linear(x)
        assert out[[1, 3]].isnan().all()
        assert torch.equal(out[[0, 2, 4]], before[[0, 2, 4]])


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_zeros(dtype: torch.dtype) -> None:
    weight, bias = random_layer(9, 20, dtype, True, INT4[32])
    assert bias is not None
    assert torch.equal(make_linear(weight, bias)(torch.zeros(3, 20, dtype=dtype)), bias.expand(3, 9))
    nothing = quantize_weight(torch.zeros(9, 20, dtype=dtype), INT4[32])
    assert torch.equal(make_linear(nothing, None)(torch.ones(3, 20, dtype=dtype)), torch.zeros(3, 9, dtype=dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_the_error_is_that_of_the_rows(dtype: torch.dtype) -> None:
    """An output differs from that of the dequantized weight by at most half a code for each number of the row."""
    weight, _ = random_layer(50, 333, dtype, False, INT4[32])
    x, dense = torch.randn(20, 333).to(dtype), weight.dequantized().double()
    out, wanted = make_linear(weight, None)(x).double(), x.double() @ dense.T
    bound = x.double().abs().amax(1, keepdim=True) / 254 * dense.abs().sum(1)
    assert ((out - wanted).abs() <= bound + wanted.abs() * float(torch.finfo(dtype).eps) + 1e-5).all()
    assert float((out - wanted).norm() / wanted.norm()) < 0.01  # 1 / 127 of each group's largest, and more is an error


def test_scales_of_too_many_bits_are_refused() -> None:
    weight, _ = random_layer(5, 40, torch.float32, False, INT4[32])
    broken = LinearWeights(weight.format, weight.codes, weight.scales * 1.0001, weight.zeros)
    with pytest.raises(ValueError, match="may have 16 significant bits"):
        make_linear(broken, None)


def test_the_weight_and_rows_in_other_layouts() -> None:
    """The weight may change after it was packed, and rows need not be contiguous."""
    weight, _ = random_layer(32, 48, torch.float32, False, INT4[32])
    linear, x = make_linear(weight, None), torch.randn(4, 48)
    before = linear(x)
    wide = torch.zeros(4, 96)
    wide[:, ::2] = x
    assert torch.equal(linear(wide[:, ::2]), before)
    weight.codes.zero_()
    weight.scales.zero_()
    assert torch.equal(linear(x), before)


def test_the_bytes_of_a_weight() -> None:
    """Half a byte for each number, and a word for each group."""
    assert INT4[128].weight_bytes((64, 1024)) == 64 * 1024 // 2 + 4 * 64 * 8
    assert INT4[32].weight_bytes((65, 1023)) == 80 * 1024 // 2 + 4 * 80 * 32
    assert INT4[64].weight_bytes((16, 65)) == 16 * 72 // 2 + 4 * 16 * 2
    assert (INT4[128].row_bytes(256), INT4[128].row_bytes(257)) == (2 * 136, 3 * 136)
    assert [INT4[32].takes(shape) for shape in ((1, 16), (1, 1 << 20), (1, 15), (0, 64), (64,))] == [True] * 2 + [
        False
    ] * 3
    assert (QUANTIZATIONS["int4"].layers, QUANTIZATIONS["int4-g32"].layers) == (INT4[128], INT4[32])
