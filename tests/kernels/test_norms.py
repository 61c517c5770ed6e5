import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernels.common import BOTH_AND_TYPES, NATIVE, REFERENCE, TYPES, WHY, close, threads
from shoal.kernels.base import Kernels, Norm, NormKind
from shoal.kernels.native import NativeKernels

KINDS: list[NormKind] = ["rms", "rms_wide", "layer"]
# (kind, has a weight, has a bias)
VARIANTS: list[tuple[NormKind, bool, bool]] = [
    ("rms", True, False),
    ("rms", False, False),
    ("rms_wide", True, False),
    ("rms_wide", False, False),
    ("layer", True, True),
    ("layer", True, False),
    ("layer", False, True),
    ("layer", False, False),
]
EPS = 1e-5


@pytest.fixture
def native() -> NativeKernels:
    if NATIVE is None:
        pytest.skip(WHY)
    return NATIVE


def make_norm(kind: NormKind, size: int, dtype: torch.dtype, weight: bool = True, bias: bool = False) -> Norm:
    weight_dtype = torch.float32 if kind == "rms_wide" else dtype
    return Norm(
        kind,
        torch.randn(size).to(weight_dtype) if weight else None,
        torch.randn(size).to(dtype) if bias else None,
        EPS,
    )


def formula(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the norm in float64, and the sum of the absolute values of its terms."""
    wide = x.double()
    if norm.kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    scale = (wide.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    weight = torch.ones(x.shape[-1], dtype=torch.float64) if norm.weight is None else norm.weight.double()
    bias = torch.zeros(x.shape[-1], dtype=torch.float64) if norm.bias is None else norm.bias.double()
    magnitude = x.double().abs().amax(-1, keepdim=True) if norm.kind == "layer" else wide.abs()
    return wide * scale * weight + bias, magnitude * scale * weight.abs() + bias.abs()


def roundings(norm: Norm) -> int:
    return 2 if norm.kind == "rms" and norm.weight is not None else 1


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
@pytest.mark.parametrize(("kind", "weight", "bias"), VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1024), (3, 33), (7, 1), (0, 64), (70, 1000), (2, 31), (2, 32)])
def test_norm(
    kernels: Kernels, dtype: torch.dtype, kind: NormKind, weight: bool, bias: bool, shape: tuple[int, int]
) -> None:
    x, norm = torch.randn(shape).to(dtype), make_norm(kind, shape[1], dtype, weight, bias)
    before = x.clone()
    out = kernels.norm(x, norm)
    assert out.dtype == dtype
    wanted, size = formula(x, norm)
    close(out, wanted, roundings(norm), size)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
@pytest.mark.parametrize(("kind", "weight", "bias"), VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1024), (3, 33), (0, 64), (70, 1000)])
def test_add_norm(
    kernels: Kernels, dtype: torch.dtype, kind: NormKind, weight: bool, bias: bool, shape: tuple[int, int]
) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    norm = make_norm(kind, shape[1], dtype, weight, bias)
    sums = x + residual
    out, total = kernels.add_norm(x.clone(), residual.clone(), norm)
    assert torch.equal(total, sums)
    wanted, size = formula(sums, norm)
    close(out, wanted, roundings(norm), size)


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
def test_a_layer_norm_far_from_zero_keeps_its_variance(kernels: Kernels, dtype: torch.dtype) -> None:
    # In float32 the difference between the mean square (1e6) and the squared mean would have an error above 0.06.
    x = (1000 + 16 * torch.randn(4, 777)).to(dtype)
    norm = make_norm("layer", 777, dtype, weight=True, bias=True)
    wanted, size = formula(x, norm)
    close(kernels.norm(x, norm), wanted, 1, size)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
def test_the_reference_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    x, w = torch.randn(5, 48).to(dtype), torch.randn(48).to(dtype)
    llama, gemma = LlamaRMSNorm(48, EPS).to(dtype), GemmaRMSNorm(48, EPS).to(dtype)
    with torch.no_grad():
        llama.weight.copy_(w)
        gemma.weight.copy_(w)
        assert torch.equal(REFERENCE.norm(x, Norm("rms", w, None, EPS)), llama(x))
        assert torch.equal(REFERENCE.norm(x, Norm("rms_wide", 1 + w.float(), None, EPS)), gemma(x))
        assert torch.equal(REFERENCE.norm(x, Norm("layer", w, None, EPS)), F.layer_norm(x, (48,), w, None, EPS))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_same_bits_in_any_batch(native: NativeKernels, dtype: torch.dtype, kind: NormKind) -> None:
    # 200 rows are shared out to all threads; a single row is computed by one thread.
    x, residual = torch.randn(2, 200, 1000).to(dtype)
    norm = make_norm(kind, 1000, dtype, bias=kind == "layer")
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append((native.norm(x, norm), *native.add_norm(x.clone(), residual.clone(), norm)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    normed, added, total = results[0]
    for i in (0, 1, 77, 199):
        row = slice(i, i + 1)
        assert torch.equal(native.norm(x[row], norm), normed[row])
        one, one_total = native.add_norm(x[row].clone(), residual[row].clone(), norm)
        assert torch.equal(one, added[row])
        assert torch.equal(one_total, total[row])


@pytest.mark.parametrize(
    ("kind", "weight_dtype"), [("rms_wide", torch.bfloat16), ("rms", torch.float32), ("layer", torch.float32)]
)
def test_weights_of_another_type_are_refused(native: NativeKernels, kind: NormKind, weight_dtype: torch.dtype) -> None:
    x, norm = torch.randn(2, 8, dtype=torch.bfloat16), Norm(kind, torch.ones(8, dtype=weight_dtype), None, EPS)
    with pytest.raises(ValueError, match=f"a norm of kind {kind} over torch.bfloat16 needs weights in"):
        native.norm(x, norm)
