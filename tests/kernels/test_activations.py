import threading

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from kernels.common import BOTH_AND_TYPES, NATIVE, REFERENCE, TYPES, WHY, close, half_subnormal, threads, unit
from shoal.kernels.base import Activation, Kernels
from shoal.kernels.native import NativeKernels

ACTIVATIONS: list[Activation] = ["silu", "gelu", "gelu_tanh", "relu"]
# The names of the activations in a config.json.
TRANSFORMERS_NAMES: dict[Activation, str] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


@pytest.fixture
def native() -> NativeKernels:
    if NATIVE is None:
        pytest.skip(WHY)
    return NATIVE


def formula(x: Tensor, activation: Activation) -> Tensor:
    x = x.double()
    if activation == "silu":
        return x * torch.sigmoid(x)
    if activation == "gelu":
        return x * 0.5 * torch.erfc(-x / 2**0.5)
    if activation == "gelu_tanh":  # x (1 + tanh u) / 2
        return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    return x.clamp(min=0)


def inputs(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 3).to(dtype)


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 3072), (3, 33), (5, 0), (0, 64), (40, 1000)])
def test_activate(kernels: Kernels, dtype: torch.dtype, activation: Activation, shape: tuple[int, int]) -> None:
    x = inputs(shape, dtype)
    out = kernels.activate(x.clone(), activation)
    assert out.dtype == dtype
    # The error of PyTorch's erf and tanh near -1 is relative to 1, so it is relative to x here: six units for the erf.
    close(out, formula(x, activation), 1, 1.5 * x.double().abs())


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_AND_TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 3072), (3, 33), (5, 0), (0, 64), (40, 1000)])
def test_activate_gated(kernels: Kernels, dtype: torch.dtype, activation: Activation, shape: tuple[int, int]) -> None:
    x = inputs((shape[0], 2 * shape[1]), dtype)
    gate, up = x.double().chunk(2, dim=-1)
    before = x.clone()
    # The activated gate is rounded, and the relative error of a subnormal number is more than a unit.
    rounding = half_subnormal(dtype) / unit(torch.float32)
    close(
        kernels.activate_gated(x, activation),
        formula(gate, activation) * up,
        2,
        (1.5 * gate.abs() + rounding) * up.abs(),
    )
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_native_keeps_small_results(native: NativeKernels, activation: Activation) -> None:
    x = torch.linspace(-8, 8, 4001).unsqueeze(0)
    wanted = formula(x, activation)
    # An error of a few units in an exponent u becomes a relative error of the exponential of u times as many units.
    size = x.double().abs()
    exponents = {"silu": size, "gelu": size**2 / 2, "gelu_tanh": 2 * (size + 0.045 * size**3), "relu": 0 * size}
    slack = (8 + 2 * exponents[activation]) * unit(torch.float32)
    assert ((native.activate(x.clone(), activation).double() - wanted).abs() <= wanted.abs() * slack).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes(native: NativeKernels, dtype: torch.dtype, activation: Activation) -> None:
    x = torch.tensor([[-1e38, -100.0, -89.0, -87.0, -86.0, -14.0, -0.0, 0.0, 14.0, 86.0, 1e38, torch.inf]]).to(dtype)
    out = native.activate_gated(torch.cat((x, torch.ones_like(x)), dim=-1), activation).double()
    wanted = torch.where(x == torch.inf, torch.inf, formula(x, activation).nan_to_num(0.0))
    # If an exponential overflows, the result, which is below 1e-35, becomes zero.
    assert ((out == wanted) | ((out - wanted).abs() <= wanted.abs() * 2 * unit(dtype) + 1e-35)).all()
    assert torch.isnan(native.activate(torch.full((1, 33), torch.nan, dtype=dtype), activation)).all()


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_has_the_bits_of_transformers(dtype: torch.dtype, activation: Activation) -> None:
    x = inputs((4, 50), dtype)
    assert torch.equal(REFERENCE.activate(x.clone(), activation), ACT2FN[TRANSFORMERS_NAMES[activation]](x))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_have_the_same_bits_in_any_batch(
    native: NativeKernels, dtype: torch.dtype, activation: Activation
) -> None:
    x = inputs((200, 1000), dtype)
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append((native.activate(x.clone(), activation), native.activate_gated(x, activation)))
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    for i in (0, 1, 77, 199):
        row = slice(i, i + 1)
        assert torch.equal(native.activate(x[row].clone(), activation), results[0][0][row])
        assert torch.equal(native.activate_gated(x[row], activation), results[0][1][row])


def test_ranks_may_be_threads(native: NativeKernels) -> None:
    xs = [torch.randn(64, 2048) for _ in range(4)]
    wanted = [native.activate_gated(x, "silu") for x in xs]
    results: list[bool] = []

    def rank(i: int) -> None:
        results.extend(torch.equal(native.activate_gated(xs[i], "silu"), wanted[i]) for _ in range(20))

    ranks = [threading.Thread(target=rank, args=(i,)) for i in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert results == [True] * 80
