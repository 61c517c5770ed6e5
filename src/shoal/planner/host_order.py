"""The order of hosts: which host takes which ranks, so that the exchanges of a step use the fastest links."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, permutations

from shoal.planner.host_traffic import Exchange, MeasuredStep
from shoal.wire.base import Ids

# Two measurements of a network differ by some percent. A change must be worth more than that.
LEAST_GAIN = 0.1
_MOST_TRIED = 6  # hosts of which all orders are tried: 720
_MOST_SWEEPS = 20


def order_hosts(exchanges: Sequence[Exchange], sizes: Sequence[int], room: Sequence[int], step: MeasuredStep) -> Ids:
    """Return for each place (a list of ranks) the number of the host that takes it.

    It is the order in which the exchanges take the least time; or each host keeps its place, if no order saves more
    than `LEAST_GAIN` of that time. With more than six hosts, the best of some orders is improved by exchanging two
    hosts as long as that helps; then it may not be the best of all.

    Args:
        exchanges: what the places exchange in a step (`host_traffic.host_exchanges`).
        sizes: the number of ranks of each place. Each fits on the host with its number.
        room: how many ranks each host may run.
    """
    count = len(sizes)
    asis = tuple(range(count))

    def fits(order: Sequence[int]) -> bool:
        return all(size <= room[host] for size, host in zip(sizes, order, strict=True))

    def seconds(order: Sequence[int]) -> float:
        return step.seconds(exchanges, order)

    if count <= _MOST_TRIED:
        best = min(filter(fits, permutations(asis)), key=seconds)  # of equal ones the first in the order of hosts
    else:
        chains = (_chain(first, count, step) for first in asis)
        starts = [asis, *(chain for chain in chains if fits(chain))]
        best = _improved(min(starts, key=seconds), fits, seconds)
    return best if seconds(best) < (1 - LEAST_GAIN) * seconds(asis) else asis


def _chain(first: int, count: int, step: MeasuredStep) -> Ids:
    """Return all hosts from one on, each followed by the host with the fastest link that is left."""
    chain, left = [first], set(range(count)) - {first}
    size = step.tokens * step.stream_bytes
    while left:
        links = {host: step.links.between(chain[-1], host) for host in left}
        nearest = min(left, key=lambda host: (links[host].latency_s + size / links[host].bandwidth, host))
        chain.append(nearest)
        left.remove(nearest)
    return tuple(chain)


def _improved(order: Ids, fits: Callable[[Sequence[int]], bool], seconds: Callable[[Sequence[int]], float]) -> Ids:
    """Exchange two hosts as long as that helps, and at most some times for each pair."""
    best, least = order, seconds(order)
    for _ in range(_MOST_SWEEPS):
        before = least
        for first, second in combinations(range(len(best)), 2):
            changed = list(best)
            changed[first], changed[second] = changed[second], changed[first]
            if fits(changed) and (took := seconds(changed)) < least:
                best, least = tuple(changed), took
        if math.isclose(before, least, rel_tol=1e-9):
            break
    return best
