"""Tests of linear layers that give the top output of each row: it is that of the outputs which they write."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.common import threads
from shoal.kernels.bf16_linear import NativeBf16Linear, load_bf16
from shoal.kernels.int4_linear import NativeInt4Linear
from shoal.kernels.int8_linear import NativeInt8Linear
from shoal.kernels.quantized import quantize_weight
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.sampling import TorchSampling
from shoal.kernels.weight_format import INT4, INT8
from support.example_counts import examples

BF16, WHY = load_bf16()
QUANTIZED, WHY_NOT = load_quantized()
Layer = NativeBf16Linear | NativeInt8Linear | NativeInt4Linear
needs_bf16 = pytest.mark.skipif(BF16 is None, reason=WHY)
needs_quantized = pytest.mark.skipif(QUANTIZED is None, reason=WHY_NOT)


def in_bf16(weight: Tensor, bias: Tensor | None) -> list[Layer]:
    assert BF16 is not None
    of_bias = None if bias is None else bias.bfloat16()
    return [NativeBf16Linear(weight.bfloat16(), of_bias, BF16, level) for level in BF16.levels]


def in_int8(weight: Tensor, bias: Tensor | None) -> list[Layer]:
    assert QUANTIZED is not None
    codes = quantize_weight(weight, INT8)
    return [NativeInt8Linear(codes, bias, QUANTIZED, level) for level in QUANTIZED.levels]


def in_int4(weight: Tensor, bias: Tensor | None) -> list[Layer]:
    assert QUANTIZED is not None
    codes = quantize_weight(weight, INT4[32])
    return [NativeInt4Linear(codes, bias, QUANTIZED, level) for level in QUANTIZED.levels]


def assert_top(layer: Layer, x: Tensor, start: int) -> None:
    found = layer.top(x, start)
    assert found is not None
    values, ids = found
    expected, expected_ids = TorchSampling().argmax(layer(x), start)
    assert torch.equal(values, expected)
    assert torch.equal(ids, expected_ids)
    assert (values.dtype, ids.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("make", "types"),
    [
        pytest.param(in_bf16, [torch.bfloat16], marks=needs_bf16),
        pytest.param(in_int8, [torch.bfloat16, torch.float32], marks=needs_quantized),
        pytest.param(in_int4, [torch.bfloat16, torch.float32], marks=needs_quantized),
    ],
)
@settings(max_examples=examples(40), deadline=None)
@given(data=st.data())
def test_the_top_output_is_the_first_of_the_largest(
    make: Callable[[Tensor, Tensor | None], list[Layer]], types: list[torch.dtype], data: st.DataObject
) -> None:
    """Weights of a few small integers make many outputs equal."""
    rows = data.draw(st.integers(0, 300), "rows")
    outputs = data.draw(st.integers(1, 700), "outputs")
    inputs = data.draw(st.integers(1, 70), "inputs")
    largest = data.draw(st.sampled_from([1, 3, 1000]), "largest")
    torch.manual_seed(data.draw(st.integers(0, 1000), "seed"))
    weight = torch.randint(-largest, largest + 1, (outputs, inputs)).float()
    bias = torch.randint(-largest, largest + 1, (outputs,)).float() if data.draw(st.booleans(), "bias") else None
    x = torch.randint(-2, 3, (rows, inputs)).to(data.draw(st.sampled_from(types), "type"))
    for layer in make(weight, bias):
        with threads(data.draw(st.integers(1, 3), "threads")):
            assert_top(layer, x, data.draw(st.sampled_from([0, 1_000_000]), "start"))


@needs_bf16
def test_infinite_outputs() -> None:
    weight = torch.randn(300, 40)
    weight[[7, 290], 0] = torch.inf
    weight[9, 1] = -torch.inf
    for layer in in_bf16(weight, None):
        x = torch.randn(5, 40).abs().bfloat16() + 1
        assert_top(layer, x, 3)
        assert_top(layer, -x, 3)


@needs_quantized
def test_a_type_that_is_not_computed() -> None:
    for layer in in_int8(torch.randn(30, 40), None):
        assert layer.top(torch.randn(2, 40).half(), 0) is None
