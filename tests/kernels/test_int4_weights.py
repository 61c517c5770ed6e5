"""Tests of making weights of 4 bits: both implementations give the same codes, and their errors are small."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.kernels.int4_weights import native_int4, quantize_int4, torch_int4
from shoal.kernels.linear_weights import LinearWeights
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.weight_format import INT4, WeightFormat
from support.example_counts import examples

TYPES = [torch.float32, torch.bfloat16, torch.float16]
LIBRARY, WHY = load_quantized()
needs_native = pytest.mark.skipif(LIBRARY is None, reason=WHY)


def same(a: LinearWeights, b: LinearWeights) -> bool:
    assert a.zeros is not None
    assert b.zeros is not None
    scales = torch.equal(a.scales.view(torch.int32), b.scales.view(torch.int32))
    return a.format is b.format and torch.equal(a.codes, b.codes) and torch.equal(a.zeros, b.zeros) and scales


def rounded(weight: Tensor, group: int) -> Tensor:
    """Return the weight with 4 bits in the plain way: the smallest and the largest number have the codes 0 and 15."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return (((groups / scale).round() + zero).clamp(0, 15) - zero).mul(scale).view_as(weight)


@needs_native
@settings(max_examples=examples(30), deadline=None)
@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 300),
    kept_in=st.sampled_from(list(INT4.values())),
    dtype=st.sampled_from(TYPES),
    exponent=st.sampled_from([-140, -100, -40, 0, 14, 100]),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    seed=st.integers(0, 1000),
)
def test_implementations_give_the_same_codes(
    outputs: int, inputs: int, kept_in: WeightFormat, dtype: torch.dtype, exponent: int, shift: float, seed: int
) -> None:
    """Also where numbers are very small or large, infinite in float16, or all on one side of 0."""
    assert LIBRARY is not None
    noise = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    weight = ((noise + shift) * 2.0**exponent).to(dtype)
    weight[0] = 0
    assert same(native_int4(weight, kept_in, LIBRARY), torch_int4(weight, kept_in))


@settings(max_examples=examples(40), deadline=None)
@given(
    outputs=st.integers(1, 20),
    groups=st.integers(1, 4),
    kept_in=st.sampled_from(list(INT4.values())),
    power=st.sampled_from([1, 3]),
    shift=st.sampled_from([0.0, 2.0, -9.0]),
    seed=st.integers(0, 1000),
)
def test_the_error_is_no_larger_than_by_plain_rounding(
    outputs: int, groups: int, kept_in: WeightFormat, power: int, shift: float, seed: int
) -> None:
    """A scale of the same size is the first that is tried. It is kept with 16 bits, which moves numbers by 2^-17."""
    assert kept_in.group is not None
    noise = torch.randn(outputs, groups * kept_in.group, generator=torch.Generator().manual_seed(seed))
    weight = noise**power + shift
    found = quantize_int4(weight, kept_in)
    ours, plain = (
        (each - weight).view(-1, kept_in.group) for each in (found.dequantized(), rounded(weight, kept_in.group))
    )
    spread = weight.view(-1, kept_in.group).abs().amax(1)
    assert (ours.norm(dim=1) <= plain.norm(dim=1) + spread * kept_in.group**0.5 * 2.0**-14).all()
    assert found.zeros is not None
    assert int(found.codes.min()) >= 0
    assert int(found.codes.max()) <= 15
    assert int(found.zeros.min()) >= 0


@pytest.mark.parametrize(("group", "most"), [(128, 0.96), (32, 0.98)])
def test_the_search_makes_errors_smaller(group: int, most: float) -> None:
    weight = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0))
    ours, plain = quantize_int4(weight, INT4[group]).dequantized(), rounded(weight, group)
    assert float((ours - weight).norm() / (plain - weight).norm()) < most


def test_numbers_that_are_not_finite_spoil_their_group_only() -> None:
    weight = torch.randn(20, 100)
    before = quantize_int4(weight, INT4[32])
    weight[3, 40], weight[5, 99] = torch.inf, torch.nan
    found = quantize_int4(weight, INT4[32])
    spoiled = found.scales.isnan()
    assert spoiled.nonzero().tolist() == [[3, 1], [5, 3]]
    assert torch.equal(found.scales[~spoiled], before.scales[~spoiled])
    assert torch.equal(found.dequantized().isnan(), spoiled.repeat_interleave(32, dim=1)[:, :100])


@pytest.mark.parametrize(("least", "most"), [(-1, 1), (-8, 7), (-8, 4), (0, 15), (-15, -3)])
def test_numbers_that_were_made_from_few_bits_are_kept(least: int, most: int) -> None:
    """Numbers that 16 codes can stand for have no error but that of the scale: ternary weights, for example."""
    codes = torch.randint(least, most + 1, (30, 128), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = least, most
    assert torch.allclose(quantize_int4(codes * 0.7, INT4[32]).dequantized(), codes * 0.7, rtol=2.0**-15, atol=0)
