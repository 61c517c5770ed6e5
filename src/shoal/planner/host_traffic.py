"""What crosses hosts in a step, for a replica over several hosts."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.models.manifest import ITEM_BYTES
from shoal.models.spec import ModelSpec
from shoal.values import format_bytes, numbered
from shoal.wire.base import Ids

_EXCHANGES_PER_LAYER = 2  # the all-reduces after attention and after the MLP


@dataclass(frozen=True, slots=True)
class HostTraffic:
    """The traffic between hosts: per token of a step, and how many times a step waits for it one after the other."""

    bytes_per_token: int
    exchanges: int

    def __str__(self) -> str:
        return f"{format_bytes(self.bytes_per_token)} per token in {numbered(self.exchanges, 'exchange')} per step"


def host_traffic(spec: ModelSpec, dtype: str, tp: int, stages: Ids, placed: Sequence[Ids]) -> HostTraffic:
    """Return what crosses hosts for a placement.

    An all-reduce over ranks on h hosts sends a residual stream 2 (h - 1) / h times from each of them (a ring). Between
    stages each rank sends the residual stream to the rank at its position. The few candidates of the sampler are left
    out.

    Args:
        stages: the number of layers of each stage.
        placed: the ranks of each host.
    """
    host_of = {rank: host for host, ranks in enumerate(placed) for rank in ranks}
    stream = spec.hidden_size * ITEM_BYTES[dtype]
    sent, exchanges = 0, 0
    for stage, layers in enumerate(stages):
        first = stage * tp
        hosts = len({host_of[rank] for rank in range(first, first + tp)})
        if hosts > 1:
            reduces = _EXCHANGES_PER_LAYER * layers + (stage == 0)  # one more after the embedding
            sent += reduces * 2 * (hosts - 1) * stream
            exchanges += reduces
        if stage:
            crossing = sum(host_of[rank] != host_of[rank - tp] for rank in range(first, first + tp))
            sent += crossing * stream
            exchanges += crossing > 0
    return HostTraffic(sent, exchanges)


def describe_traffic(
    spec: ModelSpec, dtype: str, tp: int, stages: Ids, placed: Sequence[Ids], reasons: list[str], warnings: list[str]
) -> None:
    """Append to the reasons what crosses hosts, and to the warnings a layout of as many ranks with less of it."""
    found = host_traffic(spec, dtype, tp, stages, placed)
    reasons.append(f"between hosts: {found}")
    world, hosts = tp * len(stages), len(placed)
    pp = len(stages) * hosts
    if found.exchanges <= len(stages) or world % pp or pp > spec.num_layers:
        return
    # One stage and more on each host, so that no tensor-parallel group crosses hosts.
    per_stage = [spec.num_layers // pp + (i < spec.num_layers % pp) for i in range(pp)]
    share = world // hosts
    other = host_traffic(
        spec, dtype, world // pp, tuple(per_stage), [tuple(range(i * share, (i + 1) * share)) for i in range(hosts)]
    )
    warnings.append(
        f"tensor-parallel groups cross hosts: {found}; with --tensor-parallel-size {world // pp} "
        f"--pipeline-parallel-size {pp} it would be {other}, which is faster on all but the fastest networks"
    )
