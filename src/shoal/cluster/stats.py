"""What replicas say of themselves, as one; and what one has said in several lives."""

from collections.abc import Sequence
from itertools import zip_longest

from shoal.wire.base import Ids, replace_fields
from shoal.wire.engine import EngineStats

_THE_SAME = {"block_size"}
_SMALLEST = {"max_model_len"}  # what fits into each of them
_COUNTERS = (
    *("steps", "prompt_tokens", "generated_tokens", "prefix_queries", "prefix_hits", "preemptions", "draft_tokens"),
    *("accepted_tokens", "schedule_us", "step_total_us", "step_forward_us", "step_tokens", "drafts"),
)


def merged(replicas: Sequence[EngineStats]) -> EngineStats:
    """Sums, with the ranks of all numbered through. Of start times the longest count: they ran side by side."""
    first = replicas[0]
    sums = {
        name: sum(getattr(replica, name) for replica in replicas)
        for name in first.__struct_fields__
        if isinstance(getattr(first, name), int)
    }
    sums.update({name: getattr(first, name) for name in _THE_SAME})
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
        iteration_tokens=_added([replica.iteration_tokens for replica in replicas]),
        accepted_by_position=_added([replica.accepted_by_position for replica in replicas]),
    )


def carried(past: EngineStats, now: EngineStats) -> EngineStats:
    """What holds now, with counters that go on from a former life."""
    return replace_fields(
        now,
        **{name: getattr(past, name) + getattr(now, name) for name in _COUNTERS},
        iteration_tokens=_added([past.iteration_tokens, now.iteration_tokens]),
        accepted_by_position=_added([past.accepted_by_position, now.accepted_by_position]),
        busy_before=past.busy_before,
    )


def emptied(stats: EngineStats) -> EngineStats:
    """What is left of a replica that has ended: its counters."""
    busy = _added([stats.busy_before, tuple(rank.busy_us for rank in stats.ranks)])
    return replace_fields(stats, waiting=0, running=0, num_blocks=0, free_blocks=0, ranks=(), busy_before=busy)


def _added(counts: Sequence[Ids]) -> Ids:
    return tuple(sum(each) for each in zip_longest(*counts, fillvalue=0))
