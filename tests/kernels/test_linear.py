import pytest
import torch

from shoal.kernels.linear import (
    PackedHeadLinear,
    PackedLinear,
    PlainHeadLinear,
    PlainLinear,
    make_grouped_linear,
    make_head_linear,
    make_linear,
)

TYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 5), (5, 1), (17, 100), (100, 17), (129, 33), (64, 64), (333, 777), (1024, 256), (8192, 40)]


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_product(dtype: torch.dtype, inputs: int, outputs: int, bias: bool) -> None:
    weight, x = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype), torch.randn(9, inputs).to(dtype)
    b = torch.randn(outputs).to(dtype) if bias else None
    linear = make_linear(weight, b)
    wanted = x.double() @ weight.double().T + (0 if b is None else b.double())
    # The variance of a result is about 1. The error of a float32 sum grows at most with the root of its length. In low
    # precision the result is rounded once, or twice if the bias is added afterwards.
    slack = 2.0**-24 * (4 + inputs**0.5) * 4
    unit = float(torch.finfo(dtype).eps)
    for rows in (9, 1, 0):
        out = linear(x[:rows])
        assert out.dtype == dtype
        assert out.shape == (rows, outputs)
        assert ((out.double() - wanted[:rows]).abs() <= wanted[:rows].abs() * unit + unit * bias + slack).all()


def cancelling(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and a weight whose sums are nearly 0, so that any other order of addition gives other bits.

    Sums of random numbers would hide most differences: bfloat16 keeps 8 bits of a sum that float32 made.
    """
    x, weight = torch.randn(rows, (inputs + 1) // 2), torch.randn(outputs, (inputs + 1) // 2)
    order = torch.randperm(2 * x.shape[1])[:inputs]
    return torch.cat([x, -x], 1)[:, order].to(dtype), torch.cat([weight, weight], 1)[:, order].to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [*SHAPES, (1026, 64), (3072, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_have_the_same_bits_in_any_batch(dtype: torch.dtype, inputs: int, outputs: int, bias: bool) -> None:
    x, weight = cancelling(600, outputs, inputs, dtype)
    linear = make_linear(weight, torch.randn(outputs).to(dtype) if bias else None)
    if isinstance(linear, PlainLinear):
        pytest.skip(f"{dtype} is not packed here")
    if isinstance(linear, PackedLinear) and dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        pytest.skip("sums of oneDNN's AMX kernels depend on the number of rows")
    together = linear(x)
    counts = (1, 2, 3, 4, 7, 8, 16, 17, 32, 33, 64, 65, 127, 128, 129, 300)
    assert [rows for rows in counts if not torch.equal(linear(x[:rows]), together[:rows])] == []
    assert torch.equal(linear(x[599:]), together[599:])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_no_outputs_and_no_inputs(dtype: torch.dtype, rows: int) -> None:
    assert make_linear(torch.empty(0, 8, dtype=dtype), None)(torch.randn(rows, 8).to(dtype)).shape == (rows, 0)
    bias = torch.randn(6).to(dtype)
    nothing = torch.empty(rows, 0, dtype=dtype)
    assert torch.equal(make_linear(torch.empty(6, 0, dtype=dtype), bias)(nothing), bias.expand(rows, 6))
    assert torch.equal(make_linear(torch.empty(6, 0, dtype=dtype), None)(nothing), torch.zeros(rows, 6, dtype=dtype))


def test_the_weight_may_change_after_packing() -> None:
    weight = torch.randn(32, 32)
    linear, x = make_linear(weight, None), torch.randn(4, 32)
    if isinstance(linear, PlainLinear):
        pytest.skip("nothing is packed here")
    before = linear(x)
    weight.zero_()
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize("dtype", [*TYPES, torch.float16])
@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("rows", [0, 1, 2, 9])
def test_a_matrix_for_each_head(dtype: torch.dtype, heads: int, rows: int) -> None:
    weights, x = (torch.randn(heads, 24, 40) / 40**0.5).to(dtype), torch.randn(rows, heads, 60).to(dtype)
    x = x[..., :40]  # a part of longer heads
    strided = weights.transpose(1, 2).contiguous().transpose(1, 2)
    for linear in (make_head_linear(weights), make_head_linear(strided), PlainHeadLinear(weights)):
        out = linear(x)
        wanted = torch.einsum("nhi,hoi->nho", x.double(), weights.double())
        assert out.dtype == dtype
        assert out.shape == wanted.shape
        assert ((out.double() - wanted).abs() <= wanted.abs() * float(torch.finfo(dtype).eps) + 1e-5).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_heads_have_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    linear = make_head_linear(torch.randn(3, 64, 33).to(dtype))
    if not isinstance(linear, PackedHeadLinear):
        pytest.skip(f"{dtype} is not packed here")
    x = torch.randn(200, 3, 33).to(dtype)
    together = linear(x)
    for rows in (1, 2, 7, 16, 65):
        assert torch.equal(linear(x[:rows]), together[:rows]), rows


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("counts", [[2, 0, 5], [0, 0, 0], [0, 9, 0]])
def test_a_group_of_layers(dtype: torch.dtype, counts: list[int]) -> None:
    """The first rows are those of the first layer, and so on."""
    layers = [make_linear(torch.randn(24, 40).to(dtype), None) for _ in counts]
    x = torch.randn(sum(counts), 40).to(dtype)
    wanted = [layer(rows) for layer, rows in zip(layers, x.split(counts), strict=True)]
    assert torch.equal(make_grouped_linear(layers)(x, counts), torch.cat(wanted))


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_heads_of_nothing(shape: tuple[int, int, int]) -> None:
    heads, outputs, inputs = shape
    assert torch.equal(
        make_head_linear(torch.empty(shape))(torch.empty(2, heads, inputs)), torch.zeros(2, heads, outputs)
    )
