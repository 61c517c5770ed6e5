"""What communication between ranks has cost: a table by axis of the mesh and operation, and the same as JSON."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.cluster.stats import total_traffic
from shoal.values import format_bytes
from shoal.wire.engine import EngineStats
from shoal.wire.traffic import Traffic, sum_traffic, traffic_since

_HEADER = ("axis", "operation", "calls", "sent", "time", "moving", "waiting", "waited for most", "share of steps")
_UNKNOWN = "-"  # the backend cannot measure it, or cannot tell


@dataclass(frozen=True, slots=True)
class RankWait:
    """The time that ranks have waited for one rank, because it came last."""

    replica: int
    rank: int  # of the replica
    seconds: float


@dataclass(frozen=True, slots=True)
class CommCost:
    """The cost of one operation on one axis. The times of several ranks are added up."""

    axis: str
    operation: str
    calls: int
    sent_bytes: int
    seconds: float | None  # None: the backend cannot measure it
    waiting_s: float | None  # the part of it that was spent waiting for other ranks; None: the backend cannot tell
    waits: tuple[RankWait, ...]  # the same by the rank that came last, the longest wait first
    share: float | None  # `seconds` as a share of the time that the ranks spent on steps

    @property
    def moving_s(self) -> float | None:
        """The part of the time in which tensors were moved and added; None: the backend cannot tell."""
        if self.seconds is None or self.waiting_s is None:
            return None
        return max(round(self.seconds - self.waiting_s, 6), 0.0)

    def as_json(self) -> dict[str, Any]:
        return {
            "axis": self.axis,
            "operation": self.operation,
            "calls": self.calls,
            "sent_bytes": self.sent_bytes,
            "seconds": self.seconds,
            "moving_s": self.moving_s,
            "waiting_s": self.waiting_s,
            "waited_for": [
                {"replica": each.replica, "rank": each.rank, "seconds": each.seconds} for each in self.waits
            ],
            "share": self.share,
        }


@dataclass(frozen=True, slots=True)
class CommProfile:
    """The cost of all communication, the longest time first."""

    costs: tuple[CommCost, ...]
    step_s: float  # the time that the ranks spent on steps, with all waits, added up

    @classmethod
    def of(cls, traffic: Sequence[Traffic], step_us: int, ranks: int) -> "CommProfile":
        """Return the profile of some traffic.

        Args:
            step_us: the microseconds that the same ranks spent on steps.
            ranks: how many ranks a replica has.
        """
        costs = [_cost(part, step_us, ranks) for part in traffic if part.count]
        return cls(tuple(sorted(costs, key=lambda cost: -(cost.seconds or 0.0))), step_us / 1e6)

    def as_json(self) -> dict[str, Any]:
        return {"step_s": self.step_s, "operations": [cost.as_json() for cost in self.costs]}

    def table(self) -> str:
        """Return a table for people, or a line that says why there is none."""
        if not self.costs:
            return "ranks have exchanged no tensors: each is alone in its replica"
        several = any(wait.replica for cost in self.costs for wait in cost.waits)
        rows = [_HEADER, *(_row(cost, several) for cost in self.costs)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        total = sum(cost.share or 0.0 for cost in self.costs)
        lines.append(f"in all {_percent(total)} of the {self.step_s:.2f} s that the ranks spent on steps, added up")
        if any(cost.moving_s is None for cost in self.costs):
            lines.append(f"{_UNKNOWN}: gloo does not tell waiting from moving, and NCCL's operations are not timed")
        return "\n".join(lines)


def profile_replicas(replicas: Sequence[EngineStats], since: Sequence[EngineStats] = ()) -> CommProfile:
    """Return what communication in some replicas has cost.

    Args:
        since: their earlier stats, from which to count; (): from their start. Where a replica has gone since then, its
            ranks cannot be told apart from those of others, and all count from their start.
    """
    if len(since) != len(replicas):
        since = ()
    earlier = [part for stats in since for part in total_traffic(stats)]
    now = sum_traffic(part for stats in replicas for part in total_traffic(stats))
    step_us = sum(map(_step_us, replicas)) - sum(map(_step_us, since))
    return CommProfile.of(
        traffic_since(earlier, now), step_us, max((len(stats.ranks) for stats in replicas), default=1)
    )


def print_profile(replicas: Sequence[EngineStats], since: Sequence[EngineStats] = ()) -> None:
    """Print the table of `profile_replicas` to stderr, for a user who has asked for it and may see no log."""
    print(f"communication between ranks:\n{profile_replicas(replicas, since).table()}", file=sys.stderr)


def replicas_of(stats: EngineStats) -> Sequence[EngineStats]:
    """Return the stats of each replica, if these are sums over a set of them."""
    return stats.replicas or (stats,)


def _step_us(stats: EngineStats) -> int:
    return sum(stats.busy_before) + sum(rank.busy_us + rank.stage_wait_us for rank in stats.ranks)


def _cost(part: Traffic, step_us: int, ranks: int) -> CommCost:
    waits = sorted(part.waited_for, key=lambda wait: -wait[1])
    return CommCost(
        part.axis,
        part.operation,
        part.count,
        part.sent_bytes,
        seconds=None if part.us is None else part.us / 1e6,
        waiting_s=None if part.waited_us is None else part.waited_us / 1e6,
        waits=tuple(RankWait(*divmod(rank, ranks), us / 1e6) for rank, us in waits),
        share=None if part.us is None or step_us <= 0 else part.us / step_us,
    )


def _row(cost: CommCost, several: bool) -> tuple[str, ...]:
    return (
        cost.axis,
        cost.operation,
        f"{cost.calls:,}",
        format_bytes(cost.sent_bytes),
        *(_seconds(each) for each in (cost.seconds, cost.moving_s, cost.waiting_s)),
        _longest(cost.waits, several),
        _UNKNOWN if cost.share is None else _percent(cost.share),
    )


def _longest(waits: Sequence[RankWait], several: bool) -> str:
    if not waits:
        return _UNKNOWN
    name = f"rank {waits[0].rank}" + (f" of replica {waits[0].replica}" if several else "")
    return f"{name} ({_seconds(waits[0].seconds)})"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
