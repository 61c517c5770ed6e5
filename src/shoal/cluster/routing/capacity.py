"""How much a replica can use at a time."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaCapacity:
    """The requests, and the tokens of requests, that a replica can use at a time. More would wait there."""

    requests: int
    tokens: int
    block_size: int  # the same for all replicas
    prefixes: int  # blocks of past prompts that it may remember; 0: it has no prefix cache


def most_held(max_num_seqs: int) -> int:
    """Return how many requests a replica holds: those that run, and a few that are there when some of them end."""
    return max_num_seqs + max(max_num_seqs // 8, 2)
