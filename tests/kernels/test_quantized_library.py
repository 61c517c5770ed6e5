"""Tests of what linear layers with quantized weights share: the library, and weights in any format."""

from pathlib import Path

import pytest
import torch

from shoal.kernels import quantized_library as module
from shoal.kernels.int4_linear import TorchInt4Linear
from shoal.kernels.int8_linear import TorchInt8Linear
from shoal.kernels.linear import make_linear
from shoal.kernels.linear_weights import LinearWeights
from shoal.kernels.quantized import quantize_weight
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.weight_format import INT4, INT8, WeightFormat

LIBRARY, WHY = load_quantized()


def test_groups_and_zeros_are_dequantized() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]], dtype=torch.int8)
    scales = torch.tensor([[1.0, 10.0, 100.0], [0.5, 2.0, 3.0]])
    zeros = torch.tensor([[1, 3, 4], [5, 0, 9]], dtype=torch.int8)
    weight = LinearWeights(WeightFormat("grouped", 8, group=2), codes, scales, zeros)
    assert weight.dequantized().tolist() == [[0.0, 1.0, 0.0, 10.0, 100.0], [0.0, 0.5, 14.0, 16.0, 0.0]]
    assert weight.format.unit == 2


@pytest.mark.parametrize(
    ("kept_in", "groups", "zeros"),
    [
        (WeightFormat("8 bits in groups", 8, group=2), 5, True),
        (INT8, 5, False),
        (WeightFormat("4 bits without groups", 4), 1, True),
        (WeightFormat("4 bits in groups of 8", 4, group=8), 2, True),
        (WeightFormat("4 bits in groups of 256", 4, group=256), 1, True),
        (INT4[32], 1, False),
    ],
)
def test_formats_without_a_kernel_are_refused(kept_in: WeightFormat, groups: int, zeros: bool) -> None:
    some = torch.zeros((3, groups), dtype=torch.int8)
    weight = LinearWeights(kept_in, torch.zeros((3, 10), dtype=torch.int8), some.float(), some if zeros else None)
    with pytest.raises(ValueError, match="no kernel for weights in WeightFormat"):
        make_linear(weight, None)


def test_without_the_library_pytorch_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain, bias, x = torch.randn(20, 150), torch.randn(20), torch.randn(3, 150)
    formats = {INT8: TorchInt8Linear, INT4[128]: TorchInt4Linear}
    wanted = [make_linear(quantize_weight(plain, each), bias)(x) for each in formats]
    monkeypatch.setattr(module, "__file__", str(tmp_path / "quantized_library.py"))
    load_quantized.cache_clear()
    try:
        assert load_quantized() == (None, "PyTorch: _quantized is not built")
        for (kept_in, kind), result in zip(formats.items(), wanted, strict=True):
            linear = make_linear(quantize_weight(plain, kept_in), bias)
            assert type(linear) is kind
            assert torch.equal(linear(x), result)
    finally:
        load_quantized.cache_clear()


@pytest.mark.skipif(LIBRARY is None, reason=WHY)
def test_a_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABI_VERSION", module.ABI_VERSION + 1)
    load_quantized.cache_clear()
    try:
        library, reason = load_quantized()
    finally:
        load_quantized.cache_clear()
    assert library is None
    assert "stale" in reason
