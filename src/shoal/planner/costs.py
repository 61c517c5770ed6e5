"""What a token costs, in multiplications: an estimate, to share work out by and to speak of. Free of torch.

Each element of a matrix that a token goes through is one multiplication. Tables that it is looked up in cost nothing,
and of a mixture's experts those count that a token is sent to. The output head is for tokens behind which one is drawn,
and not for those of prompts: it is counted for one of three, as with prompts twice as long as outputs. What attention
does with the context comes on top, for every layer about the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.models.manifest import Param, Shard
from shoal.models.spec import ModelSpec

_DRAWN = 1 / 3  # of the tokens that are computed, those behind which one is drawn
_BEFORE = ("project_in.weight",)  # what a token is multiplied with before the layers; in all else it is looked up


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Of a whole model: `before` and `behind` are what the first and the last stage do beside their layers."""

    layers: tuple[float, ...]
    before: float
    behind: float


def token_cost(spec: ModelSpec, params: Sequence[Param]) -> TokenCost:
    layers = [0.0] * spec.num_layers
    ends = {"first": 0.0, "last": 0.0, "every": 0.0}
    for param in params:
        cost = _cost(spec, param, _whole_size)
        if isinstance(param.at, int):
            layers[param.at] += cost
        else:
            ends[param.at] += cost
    return TokenCost(tuple(layers), before=ends["first"], behind=ends["last"])


def draft_cost(spec: ModelSpec, params: Sequence[Param], guesses: int, shard: Shard | None = None) -> float:
    """What a draft model adds to a step: a pass that follows it, without the head, and one for each guess.

    Passes are counted: where few tokens are computed at a time, each takes as long as the weights take to be read.
    Of all ranks together, or of the one that has `shard`.
    """
    held, size = (params, _whole_size) if shard is None else (shard.held(params), shard.param_size)
    follow = sum(_cost(spec, param, size) for param in held if param.at != "last")
    return follow + guesses * sum(_cost(spec, param, size) for param in held)


def cost_shares(
    spec: ModelSpec,
    params: Sequence[Param],
    shards: Sequence[Shard],
    *,
    replicas: int = 1,
    draft: Sequence[float] = (),
) -> tuple[float, ...]:
    """Each rank's share of what its replica's ranks do for a token; they sum to 1.

    Whole experts get tokens from all `replicas` that hold them together, as many from each. `draft`: what a draft model
    adds on the ranks of the last stage.
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
    for back, cost in enumerate(reversed(draft), start=1):
        costs[-back] += cost
    return tuple(cost / sum(costs) for cost in costs)


def _cost(spec: ModelSpec, param: Param, size: Callable[[Param], int]) -> float:
    if param.name == "embedding" or (param.at == "first" and param.name not in _BEFORE):
        return 0.0
    if param.at == "last":
        return size(param) * _DRAWN
    if param.expert is None or spec.moe is None:
        return size(param)
    return size(param) * spec.moe.routing.top_k / spec.moe.num_experts


def _whole_size(param: Param) -> int:
    return sum(math.prod(piece.shape) for piece in param.pieces)
