"""What replicas say of themselves, as one."""

from collections.abc import Sequence

from shoal import wire

_THE_SAME = {"block_size"}
_SMALLEST = {"max_model_len"}  # what fits into each of them


def merged(replicas: Sequence[wire.EngineStats]) -> wire.EngineStats:
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
    return wire.replace(
        first,
        **sums,
        start_s=tuple(phases.items()),
        ranks=tuple(wire.replace(rank, rank=number) for number, rank in enumerate(ranks)),
        replicas=tuple(replicas),
    )
