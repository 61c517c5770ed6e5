"""The estimated cost of computing a token, in multiplications. It is used to balance pipeline stages. Free of torch.

Each element of a matrix that a token goes through is one multiplication. Looking up a row of a table costs nothing. Of
a mixture of experts, only the experts count that a token is sent to. The output head is only needed for tokens after
which one is drawn, which most tokens of a prompt are not: it counts for one token of three, as if prompts were twice as
long as outputs. The work of attention on the context is left out, as it is about the same for every layer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.models.manifest import Param, Shard
from shoal.models.spec import ModelSpec

_DRAWN_SHARE = 1 / 3  # the share of the computed tokens after which a token is drawn
_FIRST_STAGE_MATRICES = ("project_in.weight",)  # all other tensors before the layers are tables, for look-ups


@dataclass(frozen=True, slots=True)
class TokenCost:
    """The cost of a token in a whole model."""

    layers: tuple[float, ...]  # by layer
    first_extra: float  # what the first stage computes beside its layers
    last_extra: float  # what the last stage computes beside its layers


def token_cost(spec: ModelSpec, params: Sequence[Param]) -> TokenCost:
    """Return the cost of a token in a model with these tensors."""
    layers = [0.0] * spec.num_layers
    ends = {"first": 0.0, "last": 0.0, "every": 0.0}
    for param in params:
        cost = _cost(spec, param, _whole_size)
        if isinstance(param.at, int):
            layers[param.at] += cost
        else:
            ends[param.at] += cost
    return TokenCost(tuple(layers), first_extra=ends["first"], last_extra=ends["last"])


def draft_cost(spec: ModelSpec, params: Sequence[Param], num_drafts: int, shard: Shard | None = None) -> float:
    """Return the cost that a draft model adds to a step.

    It makes one pass over the tokens of the step, without the output head, and one pass for each draft. The cost is
    counted by pass and not by token: with few tokens, a pass takes as long as reading the weights takes.

    Args:
        num_drafts: how many drafts it makes at a time.
        shard: what one rank holds of the draft model, to return the cost on this rank; None: on all ranks together.
    """
    held, size = (params, _whole_size) if shard is None else (shard.held(params), shard.param_size)
    follow = sum(_cost(spec, param, size) for param in held if param.at != "last")
    return follow + num_drafts * sum(_cost(spec, param, size) for param in held)


def cost_shares(
    spec: ModelSpec,
    params: Sequence[Param],
    shards: Sequence[Shard],
    *,
    replicas: int = 1,
    draft: Sequence[float] = (),
) -> tuple[float, ...]:
    """Return the share of the cost of a token that falls on each rank of a replica. The shares sum to 1.

    Args:
        replicas: how many replicas hold whole experts together. Such experts get tokens from all of them, the same
            number from each.
        draft: the cost that a draft model adds on each rank of the last stage.
    """
    costs = []
    for shard in shards:
        shared = replicas if shard.experts is not None else 1
        costs.append(
            sum(
                _cost(spec, param, shard.param_size) * (1 if param.expert is None else shared)
                for param in shard.held(params)
            )
        )
    for from_end, cost in enumerate(reversed(draft), start=1):
        costs[-from_end] += cost
    return tuple(cost / sum(costs) for cost in costs)


def _cost(spec: ModelSpec, param: Param, size: Callable[[Param], int]) -> float:
    if param.name == "embedding" or (param.at == "first" and param.name not in _FIRST_STAGE_MATRICES):
        return 0.0
    if param.at == "last":
        return size(param) * _DRAWN_SHARE
    if param.expert is None or spec.moe is None:
        return size(param)
    return size(param) * spec.moe.routing.top_k / spec.moe.num_experts


def _whole_size(param: Param) -> int:
    return sum(math.prod(piece.shape) for piece in param.pieces)
