"""Stats of several replicas, or of several runs of one replica, put together."""

from collections.abc import Sequence
from itertools import zip_longest

from shoal.wire.base import Ids, replace_fields
from shoal.wire.engine import EngineStats
from shoal.wire.traffic import Traffic, sum_traffic

_EQUAL = {"block_size"}  # fields that are the same for all replicas
_SMALLEST = {"max_model_len"}  # fields of which the set has the minimum: a request must fit into every replica
_PRESENT = {"waiting", "running", "num_blocks", "free_blocks"}  # fields that describe only the present run
# All other numbers are counters, which continue over the runs of a replica.
_COUNTERS = tuple(
    name
    for name, kind in EngineStats.__annotations__.items()
    if kind is int and name not in _EQUAL | _SMALLEST | _PRESENT
)


def merge_stats(replicas: Sequence[EngineStats]) -> EngineStats:
    """Return the sums over replicas, whose ranks are numbered consecutively.

    Replicas start at the same time, so each start phase gets the longest of their times.
    """
    first = replicas[0]
    sums = {
        name: sum(getattr(replica, name) for replica in replicas)
        for name in first.__struct_fields__
        if isinstance(getattr(first, name), int)
    }
    sums.update({name: getattr(first, name) for name in _EQUAL})
    sums.update({name: min(getattr(replica, name) for replica in replicas) for name in _SMALLEST})
    phases: dict[str, float] = {}
    for name, seconds in (phase for replica in replicas for phase in replica.start_s):
        phases[name] = max(seconds, phases.get(name, 0.0))
    ranks = [rank for replica in replicas for rank in replica.ranks]
    return replace_fields(
        first,
        **sums,
        start_s=tuple(phases.items()),
        ranks=tuple(replace_fields(rank, rank=number) for number, rank in enumerate(ranks)),
        replicas=tuple(replicas),
        iteration_tokens=_sum_elements([replica.iteration_tokens for replica in replicas]),
        accepted_by_position=_sum_elements([replica.accepted_by_position for replica in replicas]),
    )


def add_past_counters(past: EngineStats, now: EngineStats) -> EngineStats:
    """Return the stats of a replica's present run, with the counters of its past runs added."""
    return replace_fields(
        now,
        **{name: getattr(past, name) + getattr(now, name) for name in _COUNTERS},
        iteration_tokens=_sum_elements([past.iteration_tokens, now.iteration_tokens]),
        accepted_by_position=_sum_elements([past.accepted_by_position, now.accepted_by_position]),
        busy_before=_sum_elements([past.busy_before, now.busy_before]),
        traffic_before=sum_traffic([*past.traffic_before, *now.traffic_before]),
    )


def keep_counters(stats: EngineStats) -> EngineStats:
    """Return the stats of a replica that has ended: its counters, without requests, blocks and ranks."""
    busy = _sum_elements([stats.busy_before, tuple(rank.busy_us for rank in stats.ranks)])
    return replace_fields(
        stats,
        waiting=0,
        running=0,
        num_blocks=0,
        free_blocks=0,
        ranks=(),
        busy_before=busy,
        traffic_before=total_traffic(stats),
        trouble="",
    )


def total_traffic(stats: EngineStats) -> tuple[Traffic, ...]:
    """Return what all ranks of a replica have exchanged, in all its runs, by axis and operation."""
    return sum_traffic([*stats.traffic_before, *(part for rank in stats.ranks for part in rank.traffic)])


def _sum_elements(counts: Sequence[Ids]) -> Ids:
    return tuple(sum(each) for each in zip_longest(*counts, fillvalue=0))
