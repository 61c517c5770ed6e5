"""What crosses hosts in a step, for a replica over several hosts: how much, and how long it takes on measured links."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.models.manifest import ITEM_BYTES
from shoal.models.spec import ModelSpec
from shoal.planner.host_links import HostLinks
from shoal.values import format_bytes, numbered
from shoal.wire.base import Ids

_EXCHANGES_PER_LAYER = 2  # the all-reduces after attention and after the MLP


@dataclass(frozen=True, slots=True)
class AllReduces:
    """The all-reduces of a tensor-parallel group over several hosts in a step, one after the other, each as a ring."""

    hosts: Ids
    times: int

    @property
    def streams(self) -> int:
        """Return how often a residual stream is sent between hosts."""
        return self.times * 2 * (len(self.hosts) - 1)

    def seconds(self, links: HostLinks, stream_bytes: int, order: Sequence[int]) -> float:
        """Return the time on the measured links. `order` has the host that takes the place of each host."""
        link, others = links.slowest(order[host] for host in self.hosts), len(self.hosts) - 1
        shares = 2 * others / len(self.hosts)
        return self.times * (2 * others * link.latency_s + shares * stream_bytes / link.bandwidth)


@dataclass(frozen=True, slots=True)
class Handover:
    """The way of the residual stream from one stage to the next, for ranks of them that are on different hosts."""

    ways: tuple[tuple[int, int, int], ...]  # from a host, to a host, for so many ranks
    times: int = 1

    @property
    def streams(self) -> int:
        return sum(ranks for _, _, ranks in self.ways)

    def seconds(self, links: HostLinks, stream_bytes: int, order: Sequence[int]) -> float:
        """See `AllReduces.seconds`. The ways are used at the same time."""
        found = [(links.between(order[one], order[other]), ranks) for one, other, ranks in self.ways]
        return max(link.latency_s + ranks * stream_bytes / link.bandwidth for link, ranks in found)


Exchange = AllReduces | Handover


@dataclass(frozen=True, slots=True)
class HostTraffic:
    """The traffic between hosts: per token of a step, and how many times a step waits for it one after the other."""

    bytes_per_token: int
    exchanges: int

    def __str__(self) -> str:
        return f"{format_bytes(self.bytes_per_token)} per token in {numbered(self.exchanges, 'exchange')} per step"


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """A step whose exchanges between hosts are timed: the links, and the size of the step."""

    links: HostLinks
    layers: Ids  # of each stage
    stream_bytes: int  # of the residual stream of a token
    tokens: int  # a full step while requests draw tokens

    def seconds(self, exchanges: Sequence[Exchange], order: Sequence[int] | None = None) -> float:
        """Return how long the exchanges of a step take. `order`: see `AllReduces.seconds`; None: as they are."""
        size = self.tokens * self.stream_bytes
        hosts = range(1 + max(max(pair) for pair in self.links.links)) if order is None else order
        return sum(each.seconds(self.links, size, hosts) for each in exchanges)


def host_exchanges(tp: int, stages: Ids, placed: Sequence[Ids]) -> list[Exchange]:
    """Return what ranks of different hosts exchange in a step for a placement.

    The few candidates of the sampler and the drawn tokens are left out.

    Args:
        stages: the number of layers of each stage.
        placed: the ranks of each host.
    """
    host_of = {rank: host for host, ranks in enumerate(placed) for rank in ranks}
    found: list[Exchange] = []
    for stage, layers in enumerate(stages):
        ranks = range(stage * tp, (stage + 1) * tp)
        hosts = sorted({host_of[rank] for rank in ranks})
        if stage:
            ways = Counter((host_of[rank - tp], host_of[rank]) for rank in ranks if host_of[rank - tp] != host_of[rank])
            if ways:
                found.append(Handover(tuple((*pair, count) for pair, count in ways.items())))
        if len(hosts) > 1:
            # One more all-reduce after the embedding.
            found.append(AllReduces(tuple(hosts), _EXCHANGES_PER_LAYER * layers + (stage == 0)))
    return found


def stream_bytes(spec: ModelSpec, dtype: str) -> int:
    """Return the size of the residual stream of a token."""
    return spec.hidden_size * ITEM_BYTES[dtype]


def host_traffic(spec: ModelSpec, dtype: str, tp: int, stages: Ids, placed: Sequence[Ids]) -> HostTraffic:
    """Return how much crosses hosts for a placement. Arguments are those of `host_exchanges`.

    An all-reduce over ranks on h hosts sends a residual stream 2 (h - 1) / h times from each of them (a ring). Between
    stages each rank sends the residual stream to the rank at its position.
    """
    found = host_exchanges(tp, stages, placed)
    return HostTraffic(
        sum(each.streams for each in found) * stream_bytes(spec, dtype), sum(each.times for each in found)
    )


def shown_time(seconds: float) -> str:
    """Return a short time for a message: `12.3 ms`."""
    return f"{seconds * 1e3:.3g} ms"
