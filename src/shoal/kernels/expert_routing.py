"""The choice of experts in PyTorch: which a router's logits give to a token, and which tokens each expert gets.

Groups of experts and the correction bias are those of DeepSeek V2 and V3 (2024).
"""

import torch
from torch import Tensor

from shoal.kernels.base import ExpertPairs, Routing

_TINY = 1e-20  # avoids a division by 0 if all chosen scores are 0


def route(logits: Tensor, rule: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Do the same as `Kernels.route`."""
    logits = logits.float()
    scores = logits.softmax(-1) if rule.scoring == "softmax" else sigmoid(logits)
    ranked = scores if bias is None else scores + bias
    if rule.top_groups < rule.groups:
        ranked = _within_best_groups(ranked, rule)
    experts = ranked.topk(rule.top_k).indices
    weights = scores.gather(1, experts)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
    return experts, weights * rule.scale


def _within_best_groups(ranked: Tensor, rule: Routing) -> Tensor:
    """Return `ranked`, [n, experts], with -inf for all experts that are not in a token's best groups."""
    groups = ranked.unflatten(-1, (rule.groups, -1))
    best = groups.amax(-1) if rule.group_score == "best" else groups.topk(2).values.sum(-1)
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, best.topk(rule.top_groups).indices, False)
    within: Tensor = groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)
    return within


def sigmoid(x: Tensor) -> Tensor:
    """Return the sigmoid of x: float32, computed in float64.

    PyTorch's float32 sigmoid rounds the last elements of a tensor differently, so that the result of a row would depend
    on the number of rows.
    """
    return x.double().sigmoid().float()


def group_pairs(experts: Tensor, count: int) -> ExpertPairs:
    """Do the same as `Kernels.group_pairs`."""
    pairs = experts.flatten()
    absent, *counts = torch.bincount(pairs + 1, minlength=count + 1).tolist()
    order = pairs.argsort(stable=True)
    places = order.argsort() - absent  # negative without an expert
    return ExpertPairs(counts, order[absent:] // experts.shape[1], places.view(experts.shape))
