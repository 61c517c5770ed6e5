"""Mixtures of experts: transformers routes the same, and results do not depend on the batch or the cut."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.comm.local import LocalComm
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.errors import CheckpointError
from shoal.kernels.experts import GroupedExperts
from shoal.kernels.linear import make_linear
from shoal.kernels.reference import ReferenceKernels
from shoal.kernels.select import make_kernels
from shoal.models.layers.moe import ExpertRouter, MoE, SharedExperts
from shoal.models.spec import MoESpec, RoutingSpec
from shoal.parallel.dispatch import TensorParallelDispatch
from shoal.parallel.expert_placement import place_experts
from shoal.parallel.mesh import Axis
from shoal.parallel.partition import split

HIDDEN, EXPERTS = 32, 12
X = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3))

V2 = {"hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5}
V3 = {**V2, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}
QWEN = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": 4}
LOCAL = {"hidden_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": 3}
LIMITED = {**V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
GATES: list[Any] = [
    ("mixtral", "MixtralTopKRouter", LOCAL, RoutingSpec(3)),
    ("granitemoe", "GraniteMoeTopKRouter", LOCAL, RoutingSpec(3)),
    ("qwen2_moe", "Qwen2MoeTopKRouter", {**QWEN, "norm_topk_prob": False}, RoutingSpec(4, normalize=False)),
    ("qwen3_moe", "Qwen3MoeTopKRouter", {**QWEN, "norm_topk_prob": True}, RoutingSpec(4)),
    (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        {**V2, "topk_method": "greedy"},
        RoutingSpec(3, normalize=False, scale=1.5, wide=True),
    ),
    (
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        LIMITED,
        RoutingSpec(3, normalize=False, scale=1.5, groups=4, top_groups=2, wide=True),
    ),
    (
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        V3,
        RoutingSpec(3, "sigmoid", True, 1.5, True, groups=4, top_groups=2, group_score="best_two", wide=True),
    ),
]


def dense(experts: Tensor, weights: Tensor) -> Tensor:
    """Return the weight of each expert for each token, [n, experts]; it is 0 if the expert is not chosen."""
    return torch.zeros(len(experts), EXPERTS).scatter_(1, experts, weights)


@torch.inference_mode()
@pytest.mark.parametrize(("model", "name", "fields", "spec"), GATES)
def test_routing_is_the_same_as_in_transformers(
    model: str, name: str, fields: dict[str, Any], spec: RoutingSpec
) -> None:
    import importlib

    import transformers

    folder = f"transformers.models.{model}"
    config_class = next(
        value
        for key, value in vars(importlib.import_module(f"{folder}.configuration_{model}")).items()
        if key.endswith("Config") and issubclass(value, transformers.PreTrainedConfig) and key != "PreTrainedConfig"
    )
    gate = getattr(importlib.import_module(f"{folder}.modeling_{model}"), name)(config_class(**fields))
    gate.weight.normal_(generator=torch.Generator().manual_seed(1))
    bias = None
    if spec.correction_bias:
        gate.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(2))
        bias = gate.e_score_correction_bias
    first, second = gate(X)[1:]  # weights and experts, also in granitemoe
    for kernels in (make_kernels("cpu", torch.float32)[0], ReferenceKernels()):
        experts, weights = ExpertRouter(make_linear(gate.weight, None), bias, spec, kernels)(X)
        assert (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
        assert torch.allclose(dense(experts, weights), dense(second, first), atol=1e-6)
        assert (weights.sum(-1) - 1).abs().max() > 0.1 or spec.normalize


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (RoutingSpec(2, groups=5), "12 experts can't be divided into 5 equal groups"),
        (RoutingSpec(2, groups=4, top_groups=5), "choose from 5 groups of experts, but there are only 4"),
        (RoutingSpec(7, groups=4, top_groups=2), "chooses 7 experts, but has only 6 to choose from"),
        (RoutingSpec(13), "chooses 13 experts, but has only 12 to choose from"),
    ],
)
def test_impossible_routing_is_refused(routing: RoutingSpec, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        MoESpec(EXPERTS, 8, routing, (True,))


# --- a mixture over ranks -----------------------------------------------------------------------------------------

INNER, SHARED = 20, 28
GENERATOR = torch.Generator().manual_seed(0)
SPEC = RoutingSpec(4)


def matrix(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR) * 0.3


ROUTER, GATE = matrix(EXPERTS, HIDDEN), matrix(1, HIDDEN)
UP = [(matrix(INNER, HIDDEN), matrix(INNER, HIDDEN)) for _ in range(EXPERTS)]
DOWN = [matrix(HIDDEN, INNER) for _ in range(EXPERTS)]
SHARED_UP, SHARED_DOWN = (matrix(SHARED, HIDDEN), matrix(SHARED, HIDDEN)), matrix(HIDDEN, SHARED)


def mixture(tp: Axis, experts: Sequence[int] | None, dtype: torch.dtype = torch.float32) -> MoE:
    """Return one rank's part of the mixture: some columns of each expert, or these `experts` whole."""
    kernels, _ = make_kernels("cpu", dtype)
    activate = partial(kernels.activate_gated, activation="silu")
    columns = range(INNER) if experts is not None else split(INNER, tp.size)[tp.rank]
    shared = split(SHARED, tp.size)[tp.rank]
    slots = None
    if experts is not None:
        slots = torch.full((EXPERTS,), -1)
        slots[torch.tensor(experts, dtype=torch.int64)] = torch.arange(len(experts))
    held = range(EXPERTS) if experts is None else experts

    def rows(pair: tuple[Tensor, Tensor], cut: range) -> Any:
        return make_linear(torch.cat([part[cut.start : cut.stop] for part in pair]).to(dtype), None)

    def some_columns(whole: Tensor, cut: range) -> Any:
        return make_linear(whole[:, cut.start : cut.stop].to(dtype).contiguous(), None)

    return MoE(
        ExpertRouter(make_linear(ROUTER.to(dtype), None), None, SPEC, kernels),
        GroupedExperts(
            [rows(UP[e], columns) for e in held], activate, [some_columns(DOWN[e], columns) for e in held], kernels
        ),
        SharedExperts(
            rows(SHARED_UP, shared), activate, some_columns(SHARED_DOWN, shared), make_linear(GATE.to(dtype), None)
        ),
        TensorParallelDispatch(tp, slots),
        torch.empty(0, HIDDEN, dtype=dtype),
    )


def over_ranks(tp: int, run: Callable[[Axis], Any]) -> list[Any]:
    group = ThreadGroup(tp, timeout_s=60)

    def rank(number: int) -> Any:
        try:
            return run(Axis("tp", number, tp, ThreadComm(group, number) if tp > 1 else LocalComm()))
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(tp) as pool:
        return list(pool.map(rank, range(tp)))


def wanted(x: Tensor) -> Tensor:
    """Compute the mixture by its formula, in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    shares = (x.double() @ ROUTER.double().t()).softmax(-1)
    for i, row in enumerate(x.double()):
        best = shares[i].topk(SPEC.top_k)
        for expert, weight in zip(best.indices.tolist(), best.values / best.values.sum(), strict=True):
            gate, up = (part.double() @ row for part in UP[expert])
            out[i] += weight * (DOWN[expert].double() @ (torch.nn.functional.silu(gate) * up))
        gate, up = (part.double() @ row for part in SHARED_UP)
        scale = torch.sigmoid(GATE.double() @ row)
        out[i] += scale * (SHARED_DOWN.double() @ (torch.nn.functional.silu(gate) * up))
    return out


@pytest.mark.parametrize("placement", [None, "linear", "round_robin"])
@pytest.mark.parametrize("tp", [1, 2, 3, 5])
def test_a_mixture_over_ranks_computes_the_formula_with_one_all_reduce(tp: int, placement: Any) -> None:
    def run(axis: Axis) -> tuple[Tensor, int]:
        placed = None if placement is None else place_experts(EXPERTS, tp, placement)[axis.rank]
        layer = mixture(axis, placed)
        before = axis.comm.progress.read_totals().get("all_reduce") if tp > 1 else None
        out = layer(X)
        after = axis.comm.progress.read_totals().get("all_reduce") if tp > 1 else None
        return out, (after.count if after else 0) - (before.count if before else 0)

    found = over_ranks(tp, run)
    assert all(torch.equal(out, found[0][0]) for out, _ in found)
    assert torch.allclose(found[0][0].double(), wanted(X), atol=1e-4)
    assert [count for _, count in found] == [int(tp > 1)] * tp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 3])
def test_a_tokens_result_does_not_depend_on_the_batch(tp: int, dtype: torch.dtype) -> None:
    """In the same layout, it has the same bits."""
    x = X.to(dtype)

    def run(axis: Axis) -> tuple[Tensor, Tensor]:
        layer = mixture(axis, None, dtype)
        return layer(x), torch.cat([layer(x[:1]), layer(x[1:8]), layer(x[8:])])

    for whole, parts in over_ranks(tp, run):
        assert torch.equal(whole, parts)


@pytest.mark.parametrize("experts", [None, [0, 7], []])
def test_a_mixture_may_have_no_tokens(experts: list[int] | None) -> None:
    layer = mixture(Axis("tp", 0, 1, LocalComm()), experts)
    assert layer(X[:0]).shape == (0, HIDDEN)
    layer.join()


def test_join_takes_part_in_dispatch_and_combine() -> None:
    seen: list[tuple[str, int]] = []

    class Recorder(TensorParallelDispatch):
        def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Any:
            seen.append(("dispatch", len(x)))
            return super().dispatch(x, experts, weights)

        def combine(self, out: Tensor, partial: Tensor | None) -> Tensor:
            seen.append(("combine", len(out)))
            return super().combine(out, partial)

    layer = mixture(Axis("tp", 0, 1, LocalComm()), None)
    layer.dispatch = Recorder(Axis("tp", 0, 1, LocalComm()))
    layer.join()
    assert seen == [("dispatch", 0), ("combine", 0)]
