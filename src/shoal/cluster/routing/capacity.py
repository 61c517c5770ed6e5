"""The capacity of a replica: the requests and tokens that it can have at a time."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaCapacity:
    """The requests and tokens that a replica can have at a time. More requests than these would wait there."""

    requests: int
    tokens: int
    block_size: int  # the same for all replicas
    prefix_blocks: int  # blocks of past prompts that it may remember; 0: it has no prefix cache


def max_requests_held(max_num_seqs: int) -> int:
    """Return how many requests a replica may have: those that run, and a few to replace them when they end."""
    return max_num_seqs + max(max_num_seqs // 8, 2)
