"""The placement of experts on ranks. This module is free of torch."""

from typing import Literal

from shoal.parallel.partition import split


def place_experts(experts: int, ranks: int, strategy: Literal["linear", "round_robin"]) -> tuple[tuple[int, ...], ...]:
    """Return the experts that each rank holds.

    The ranks' counts differ by one at most. With more ranks than experts some ranks hold none.
    """
    if strategy == "linear":
        return tuple(tuple(share) for share in split(experts, ranks))
    return tuple(tuple(range(rank, experts, ranks)) for rank in range(ranks))
