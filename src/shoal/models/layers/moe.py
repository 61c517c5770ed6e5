"""Mixtures of experts (Shazeer et al., 2017): a router chooses some experts for each token, instead of one MLP.

The output for a token is the weighted sum of the outputs of its experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.kernels.experts import GroupedExperts
from shoal.kernels.linear import Linear
from shoal.kernels.native_calls import compute
from shoal.models.spec import RoutingSpec
from shoal.parallel.dispatch import Dispatch

_TINY = 1e-20  # avoids a division by 0 if all chosen scores are 0


def route(logits: Tensor, spec: RoutingSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the experts of each token, int64 [n, top_k], the best first, and their weights, float32 [n, top_k].

    The result for a token does not depend on other tokens. Groups and the correction bias are those of DeepSeek V2 and
    V3 (2024).

    Args:
        logits: [n, experts].
        bias: float32 [experts], if the spec has a correction bias.
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
    """Return `ranked`, [n, experts], with -inf for all experts that are not in a token's best groups."""
    groups = ranked.unflatten(-1, (spec.groups, -1))
    best = groups.amax(-1) if spec.group_score == "best" else groups.topk(2).values.sum(-1)
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(spec.top_groups).indices, False)
    within: Tensor = groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)
    return within


def sigmoid(x: Tensor) -> Tensor:
    """Return the sigmoid of x: float32, computed in float64.

    PyTorch's float32 sigmoid rounds the last elements of a tensor differently, so that the result of a row would depend
    on the number of rows.
    """
    return x.double().sigmoid().float()


class ExpertRouter:
    """The router of a mixture.

    `linear` computes a logit for each expert; its weights are float32 if the spec is `wide`.
    """

    def __init__(self, linear: Linear, bias: Tensor | None, spec: RoutingSpec) -> None:
        self.linear = linear
        self.bias = bias
        self.spec = spec

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts, int64 [n, top_k], and their weights, float32 [n, top_k], for x: [n, hidden]."""
        return route(self.linear(x.float() if self.spec.wide else x), self.spec, self.bias)


class SharedExperts:
    """The shared experts: an MLP for all tokens, cut over tensor-parallel ranks.

    If there is a `gate`, the output is scaled by its sigmoid.
    """

    def __init__(self, up: Linear, activate: Callable[[Tensor], Tensor], down: Linear, gate: Linear | None) -> None:
        self.up = up
        self.activate = activate
        self.down = down
        self.gate = gate

    def __call__(self, x: Tensor) -> Tensor:
        """Return this rank's part of the sum, [n, hidden], for x: [n, hidden]."""
        out = self.down(self.activate(self.up(x)))
        return out if self.gate is None else compute(_gated, out, out.shape, self.gate(x))


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * sigmoid(gate.float()).to(x.dtype)


class MoE:
    """The mixture of experts of one layer. `no_tokens`: [0, hidden], the input of a step without tokens."""

    def __init__(
        self,
        router: ExpertRouter,
        experts: GroupedExperts,
        shared: SharedExperts | None,
        dispatch: Dispatch,
        no_tokens: Tensor,
    ) -> None:
        self.router = router
        self.experts = experts
        self.shared = shared
        self.dispatch = dispatch
        self.no_tokens = no_tokens

    def __call__(self, x: Tensor) -> Tensor:
        """Return [n, hidden] for x: [n, hidden]. Both are the same on all tensor-parallel ranks."""
        out = compute(self._routed, x, x.shape) if self.dispatch.keeps_tokens else self._routed(x)
        return self.dispatch.combine(out, self.shared(x) if self.shared else None)

    def _routed(self, x: Tensor) -> Tensor:
        """Return the results of this rank's experts, for the tokens that reach them."""
        routed = self.dispatch.dispatch(x, *self.router(x))
        return self.experts(routed.x, routed.experts, routed.weights)

    def join(self) -> None:
        """Take part in a step without tokens: compute the tokens that arrive from other ranks."""
        self(self.no_tokens)
