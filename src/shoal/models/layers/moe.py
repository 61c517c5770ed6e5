"""Mixtures of experts: a router chooses some experts for each token, and their weighted sum stands for the MLP
(Shazeer et al., 2017)."""

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.experts import GroupedExperts
from shoal.kernels.linear import Linear
from shoal.models.spec import RoutingSpec
from shoal.parallel.dispatch import Dispatch

_TINY = 1e-20  # where all chosen scores are 0


def route(logits: Tensor, spec: RoutingSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, the best first.

    logits: [n, experts]; bias: float32 [experts], where the spec has a correction bias. Gives int64 and float32
    [n, top_k]. A row's result does not depend on other rows. Groups and the bias are DeepSeek-V2's and V3's (2024).
    """
    logits = logits.float()
    scores = logits.softmax(-1) if spec.scoring == "softmax" else sigmoid(logits)
    ranked = scores if bias is None else scores + bias
    if spec.top_groups < spec.groups:
        ranked = _within_best_groups(ranked, spec)
    experts = ranked.topk(spec.top_k).indices
    weights = scores.gather(1, experts)
    if spec.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    return experts, weights * spec.scale


def _within_best_groups(ranked: Tensor, spec: RoutingSpec) -> Tensor:
    """ranked: [n, experts]. What is not in the best groups becomes less than everything."""
    groups = ranked.unflatten(-1, (spec.groups, -1))
    best = groups.amax(-1) if spec.group_score == "best" else groups.topk(2).values.sum(-1)
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(spec.top_groups).indices, False)
    within: Tensor = groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)
    return within


def sigmoid(x: Tensor) -> Tensor:
    """x: float32. By way of float64: PyTorch's float32 sigmoid has other last bits for the last elements of a tensor,
    so that a row's would depend on the number of rows."""
    return x.double().sigmoid().float()


class ExpertRouter:
    def __init__(self, linear: Linear, bias: Tensor | None, spec: RoutingSpec) -> None:
        """linear: to a logit for each expert, of float32 weights where the spec is `wide`."""
        self.linear = linear
        self.bias = bias
        self.spec = spec

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [n, hidden]. Gives experts int64 [n, top_k], weights float32 [n, top_k]."""
        return route(self.linear(x.float() if self.spec.wide else x), self.spec, self.bias)


class SharedExperts:
    """An MLP for every token, cut over the tensor-parallel ranks; with a `gate`, scaled by its sigmoid."""

    def __init__(self, up: Linear, activate: Callable[[Tensor], Tensor], down: Linear, gate: Linear | None) -> None:
        self.up = up
        self.activate = activate
        self.down = down
        self.gate = gate

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, hidden]. Gives this rank's part of the sum."""
        out = self.down(self.activate(self.up(x)))
        return out if self.gate is None else out * sigmoid(self.gate(x).float()).to(out.dtype)


class MoE:
    """`nothing`: [0, hidden], what a rank without tokens takes part with."""

    def __init__(
        self,
        router: ExpertRouter,
        experts: GroupedExperts,
        shared: SharedExperts | None,
        dispatch: Dispatch,
        nothing: Tensor,
    ) -> None:
        self.router = router
        self.experts = experts
        self.shared = shared
        self.dispatch = dispatch
        self.nothing = nothing

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, hidden], and so the result, the same on each tensor-parallel rank."""
        routed = self.dispatch.dispatch(x, *self.router(x))
        out = self.experts(routed.x, routed.experts, routed.weights)
        return self.dispatch.combine(routed, out, self.shared(x) if self.shared else None)

    def join(self) -> None:
        """Computes what arrives from other ranks, in a step in which this replica has no token."""
        self(self.nothing)
