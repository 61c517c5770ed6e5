"""Mixtures of experts (Shazeer et al., 2017): a router chooses some experts for each token, instead of one MLP.

The output for a token is the weighted sum of the outputs of its experts.
"""

from collections.abc import Callable

from torch import Tensor

from shoal.kernels.base import Kernels
from shoal.kernels.expert_routing import sigmoid
from shoal.kernels.experts import GroupedExperts
from shoal.kernels.linear import Linear
from shoal.kernels.native_calls import compute
from shoal.models.spec import RoutingSpec
from shoal.parallel.dispatch import Dispatch


class ExpertRouter:
    """The router of a mixture.

    `linear` computes a logit for each expert; its weights are float32 if the spec is `wide`.
    """

    def __init__(self, linear: Linear, bias: Tensor | None, spec: RoutingSpec, kernels: Kernels) -> None:
        """`bias`: float32 [experts], if the spec has a correction bias."""
        self.linear = linear
        self.bias = bias
        self.spec = spec
        self.kernels = kernels

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts, int64 [n, top_k], and their weights, float32 [n, top_k], for x: [n, hidden]."""
        return self.kernels.route(self.linear(x.float() if self.spec.wide else x), self.spec, self.bias)


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
