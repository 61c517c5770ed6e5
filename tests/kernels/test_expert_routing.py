"""The choice of experts, in C++ and in PyTorch: both do the same, and a row does not depend on other rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.common import BOTH, NATIVE, REFERENCE, TYPES, needs_native
from shoal.kernels.base import Kernels
from shoal.kernels.expert_routing import sigmoid
from shoal.models.spec import RoutingSpec
from support.fakes import steady

EXPERTS = 24
ROUTINGS = st.builds(
    RoutingSpec,
    top_k=st.integers(1, 4),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    groups=st.sampled_from([1, 4, 6]),
    top_groups=st.integers(2, 4),
    group_score=st.sampled_from(["best", "best_two"]),
)


@pytest.mark.parametrize("kernels", BOTH)
@settings(steady, max_examples=40)
@given(spec=ROUTINGS, rows=st.integers(1, 40), biased=st.booleans(), seed=st.integers(0, 2**31))
def test_the_routing_of_a_row_does_not_depend_on_other_rows(
    kernels: Kernels, spec: RoutingSpec, rows: int, biased: bool, seed: int
) -> None:
    """If a row is routed alone, its experts and weights have the same bits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, EXPERTS, generator=generator) * 3
    bias = torch.randn(EXPERTS, generator=generator) if biased else None
    experts, weights = kernels.route(logits, spec, bias)
    size = EXPERTS // spec.groups
    for i in range(rows):
        alone = kernels.route(logits[i : i + 1], spec, bias)
        assert torch.equal(alone[0][0], experts[i])
        assert torch.equal(alone[1][0], weights[i])
        assert len(set(experts[i].tolist())) == spec.top_k
        assert spec.groups == 1 or len({expert // size for expert in experts[i].tolist()}) <= spec.top_groups
    if spec.normalize:
        assert torch.allclose(weights.sum(-1), torch.tensor(spec.scale))


@needs_native
@settings(steady, max_examples=100)
@given(
    spec=ROUTINGS,
    rows=st.integers(0, 300),
    multiple=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from(TYPES),
    biased=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_both_implementations_choose_the_same(
    spec: RoutingSpec, rows: int, multiple: int, dtype: torch.dtype, biased: bool, seed: int
) -> None:
    assert NATIVE is not None
    generator = torch.Generator().manual_seed(seed)
    count = EXPERTS * multiple
    # Distinct logits, whose scores differ by far more than their errors: of equal ones each may choose another.
    steps = torch.stack([torch.randperm(count, generator=generator) for _ in range(rows)] or [torch.empty(0, count)])
    logits = (steps / count * 6 - 3).view(rows, count).to(dtype)
    bias = torch.randperm(count, generator=generator) * (1.37 / count) if biased else None
    experts, weights = NATIVE.route(logits, spec, bias)
    wanted_experts, wanted_weights = REFERENCE.route(logits, spec, bias)
    assert experts.shape == wanted_experts.shape
    same = (experts == wanted_experts).all(1)
    if not biased and (spec.groups == 1 or spec.group_score == "best"):
        assert same.all()
    else:  # scores that are sums of two numbers may be equal but for their errors; few rows have such scores
        assert (~same).sum() <= 1 + rows // 50
    # Both sum a row's exponentials in float32, each in its own order: a few units in the last place.
    assert torch.allclose(weights[same], wanted_weights[same], rtol=2e-6, atol=0)


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_experts_exist_whatever_the_logits_are(kernels: Kernels, value: float) -> None:
    logits = torch.randn(5, EXPERTS)
    logits[2] = value
    logits[3, 4] = value
    for spec in (RoutingSpec(3), RoutingSpec(3, "sigmoid", groups=4, top_groups=2)):
        experts, _ = kernels.route(logits, spec, None)
        assert ((experts >= 0) & (experts < EXPERTS)).all()
        assert all(len(set(row)) == 3 for row in experts.tolist())


def test_more_experts_than_the_code_in_cpp_takes() -> None:
    logits = torch.randn(3, 5000)
    for kernels in (NATIVE, REFERENCE):
        if kernels is not None:
            assert torch.equal(kernels.route(logits, RoutingSpec(4), None)[0], logits.topk(4).indices)


@pytest.mark.parametrize("kernels", BOTH)
@settings(steady, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(-1, 6), min_size=3, max_size=3), max_size=20),
)
def test_pairs_are_sorted_by_experts(kernels: Kernels, rows: list[list[int]]) -> None:
    found = kernels.group_pairs(torch.tensor(rows, dtype=torch.int64).view(-1, 3), 7)
    pairs = [(expert, i, j) for i, row in enumerate(rows) for j, expert in enumerate(row) if expert >= 0]
    ordered = sorted(pairs, key=lambda pair: pair[0])  # otherwise in the order of the rows
    assert found.counts == [sum(pair[0] == expert for pair in pairs) for expert in range(7)]
    assert found.rows.tolist() == [i for _, i, _ in ordered]
    places = {(i, j): place for place, (_, i, j) in enumerate(ordered)}
    for i, row in enumerate(found.places.tolist()):
        assert [place if place >= 0 else None for place in row] == [places.get((i, j)) for j in range(3)]


def test_the_sigmoid_of_an_element_does_not_depend_on_its_position() -> None:
    x = torch.randn(4099) * 4
    assert torch.equal(sigmoid(x), torch.cat([sigmoid(x[i : i + 1]) for i in range(len(x))]))
    assert torch.allclose(sigmoid(x), x.sigmoid())


@pytest.mark.parametrize("kernels", BOTH)
def test_weights_are_zero_and_not_nan_if_all_scores_underflow(kernels: Kernels) -> None:
    _, weights = kernels.route(torch.full((1, EXPERTS), -200.0), RoutingSpec(2, "sigmoid"), None)
    assert torch.equal(weights, torch.zeros(1, 2))
