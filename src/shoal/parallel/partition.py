"""The split of a dimension over ranks. Uneven shares are normal, and a rank's share may be empty."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


def split(total: int, ranks: int, unit: int = 1, weights: Sequence[int] | None = None) -> tuple[range, ...]:
    """Split `range(total)` at multiples of `unit` into contiguous shares, in proportion to the ranks' `weights`.

    Weights are positive, one per rank. With None all weights are equal: shares differ by one unit at most, and the
    larger ones come first. The last share ends at `total`, which need not be a multiple of the unit.
    """
    shares, start = [], 0
    for count in _apportion(-(-total // unit), weights or (1,) * ranks):
        stop = start + count
        shares.append(range(min(start * unit, total), min(stop * unit, total)))
        start = stop
    return tuple(shares)


def _apportion(units: int, weights: Sequence[int]) -> list[int]:
    """Return whole numbers in proportion to the weights that sum to `units` (Hamilton's method).

    All are rounded down first; the units left over go to the largest remainders, and among equals to the first.
    """
    weight_sum = sum(weights)
    counts = [units * weight // weight_sum for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda rank: -(units * weights[rank] % weight_sum))
    for rank in by_remainder[: units - sum(counts)]:
        counts[rank] += 1
    return counts


@dataclass(frozen=True, slots=True)
class HeadSplit:
    """The attention heads of one rank: a range of query heads, and every KV head that one of them reads.

    A KV head whose query heads are on several ranks is copied to each of them. `q_to_kv[i]` is the index in `kv_ids`
    of the KV head that local query head i reads. Kernels use this table: the quotient of the head counts would be
    wrong for a rank that holds parts of two groups.
    """

    q_range: range
    kv_ids: range
    q_to_kv: tuple[int, ...]


def split_heads(q_heads: int, kv_heads: int, ranks: int, weights: Sequence[int] | None = None) -> tuple[HeadSplit, ...]:
    """Split the heads of grouped-query attention. `q_heads` is a multiple of `kv_heads`, not necessarily of `ranks`.

    The query heads of a KV head (a group) stay on one rank if the largest load of a rank, heads over weight, does not
    grow by that: 8 query and 4 KV heads over 2 ranks give 4 and 4 query heads. Otherwise groups are split: 6 and 2
    over 3 ranks give 2, 2 and 2 query heads, and the middle rank has one of each group.
    """
    group = q_heads // kv_heads
    by_group = split(q_heads, ranks, group, weights)
    by_head = split(q_heads, ranks, weights=weights)
    q_ranges = by_group if _max_load(by_group, weights) <= _max_load(by_head, weights) else by_head
    shares = []
    for q_range in q_ranges:
        kv_ids = range(q_range.start // group, -(-q_range.stop // group)) if q_range else range(0)
        q_to_kv = tuple(q // group - kv_ids.start for q in q_range)
        shares.append(HeadSplit(q_range, kv_ids, q_to_kv))
    return tuple(shares)


def _max_load(shares: Sequence[range], weights: Sequence[int] | None) -> Fraction:
    return max(
        Fraction(len(share), weight) for share, weight in zip(shares, weights or (1,) * len(shares), strict=True)
    )
