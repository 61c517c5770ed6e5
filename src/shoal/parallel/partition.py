"""How a dimension is cut over ranks. Uneven is normal, and a rank may get nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


def split(total: int, ranks: int, unit: int = 1, weights: Sequence[int] | None = None) -> tuple[range, ...]:
    """Contiguous shares of `range(total)`, cut at multiples of `unit`, as near to the ranks' `weights` as that allows.

    Weights are positive, by rank; None: all the same, so that shares are even and the first are larger. The last share
    ends at `total` even where that is no multiple of the unit.
    """
    shares, start = [], 0
    for count in _quotas(-(-total // unit), weights or (1,) * ranks):
        stop = start + count
        shares.append(range(min(start * unit, total), min(stop * unit, total)))
        start = stop
    return tuple(shares)


def _quotas(units: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `units`, in proportion to the weights: what is left after rounding down goes to the
    largest remainders (Hamilton's method), among equals to the first."""
    whole = sum(weights)
    quotas = [units * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda rank: -(units * weights[rank] % whole))
    for rank in by_remainder[: units - sum(quotas)]:
        quotas[rank] += 1
    return quotas


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """The attention heads of one rank: a range of query heads, and every KV head that one of them reads.

    Where a KV head's queries lie on several ranks, each of these holds a copy of it. `q_to_kv[i]` is the position
    in `kv_ids` of the head that local query head i reads; a kernel takes this, never a quotient of head counts,
    which is wrong for a rank that holds parts of two groups.
    """

    q_range: range
    kv_ids: range
    q_to_kv: tuple[int, ...]


def split_heads(q_heads: int, kv_heads: int, ranks: int, weights: Sequence[int] | None = None) -> tuple[HeadSplit, ...]:
    """Cuts grouped-query attention. `q_heads` is a multiple of `kv_heads`; neither need divide by `ranks`.

    Groups of queries that share a KV head stay together where that leaves the fullest rank, for its weight, no fuller
    than a cut through groups would (8 and 4 over 2: 4, 4); else groups are cut (6 and 2 over 3: 2, 2, 2, and the
    middle rank has halves of both).
    """
    group = q_heads // kv_heads
    by_group = split(q_heads, ranks, group, weights)
    by_head = split(q_heads, ranks, weights=weights)
    q_ranges = by_group if _fullest(by_group, weights) <= _fullest(by_head, weights) else by_head
    shares = []
    for q_range in q_ranges:
        kv_ids = range(q_range.start // group, -(-q_range.stop // group)) if q_range else range(0)
        q_to_kv = tuple(q // group - kv_ids.start for q in q_range)
        shares.append(HeadSplit(q_range, kv_ids, q_to_kv))
    return tuple(shares)


def _fullest(shares: Sequence[range], weights: Sequence[int] | None) -> Fraction:
    return max(
        Fraction(len(share), weight) for share, weight in zip(shares, weights or (1,) * len(shares), strict=True)
    )
