"""The last statuses of a server, and the rates and shares of time that follow from them."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import UserError

SPAN_S = 4.0  # rates are over the last seconds, or over fewer if there are no older statuses
BUSY_SPAN_S = 15.0  # as SPAN_S, but for ranks, whose numbers change only every few seconds
IDLE_AFTER_S = 8.0  # a rank whose numbers stay the same for so long is idle
ALIVE = ("ready", "leaving")
Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rates:
    """The activity of one replica, or of all, over the last seconds."""

    generated: float  # tokens per second
    prompt: float  # tokens per second
    queries: int  # tokens that were looked up in the prefix cache
    hits: int  # tokens that were found there


@dataclass(slots=True)
class _Rank:
    """A rank's busy time as the last statuses have it."""

    pid: int
    busy_us: int
    unchanged_since: float
    changes: deque[tuple[float, int]] = field(default_factory=deque)  # (server's time, busy_us) of each new value
    share: float | None = None

    def add(self, now: float, busy_us: int) -> None:
        """Take in the busy time of a new status."""
        if busy_us != self.busy_us:
            self.busy_us, self.unchanged_since = busy_us, now
            self.changes.append((now, busy_us))
            while len(self.changes) > 2 and now - self.changes[1][0] >= BUSY_SPAN_S:
                self.changes.popleft()
            seconds = now - self.changes[0][0]
            if seconds:
                self.share = max(0.0, min(1.0, (busy_us - self.changes[0][1]) / 1e6 / seconds))
        elif now - self.unchanged_since > IDLE_AFTER_S:
            self.changes.clear()
            self.share = 0.0


class StatusHistory:
    """The last statuses of a server, as far back as rates need them.

    Their time is the server's `uptime_s`, so that it does not matter how long an answer takes to arrive.
    """

    def __init__(self) -> None:
        self._statuses: deque[Status] = deque()
        self._ranks: dict[tuple[int, int], _Rank] = {}

    def add(self, status: Any) -> None:
        """Add a new status.

        Raises:
            UserError: it is not a status of a server of this version.
        """
        if not isinstance(status, Mapping) or not {"replicas", "uptime_s", "tp", "pp"} <= set(status):
            raise UserError("the server's /v1/admin/status has an unknown form: is it a server of this version?")
        if self._statuses and status["uptime_s"] < self._statuses[-1]["uptime_s"]:  # the server was restarted
            self._statuses.clear()
            self._ranks.clear()
        self._statuses.append(status)
        while len(self._statuses) > 2 and status["uptime_s"] - self._statuses[1]["uptime_s"] >= SPAN_S:
            self._statuses.popleft()
        self._add_ranks(status)

    @property
    def latest(self) -> Status:
        return self._statuses[-1]

    def rates(self) -> Rates | None:
        """Return the sums over all replicas; None while there is only one status."""
        parts = [part for each in self.latest["replicas"] if (part := self.rates_of(each["number"])) is not None]
        if not self._seconds():
            return None
        return Rates(
            sum(part.generated for part in parts),
            sum(part.prompt for part in parts),
            sum(part.queries for part in parts),
            sum(part.hits for part in parts),
        )

    def rates_of(self, number: int) -> Rates | None:
        """Return the rates of one replica; None if it is not in both the oldest and the newest status."""
        before, now, seconds = self._stats(0, number), self._stats(-1, number), self._seconds()
        if before is None or now is None or not seconds:
            return None
        grown = {
            name: max(0, now[name] - before[name])
            for name in ("generated_tokens", "prompt_tokens", "prefix_queries", "prefix_hits")
        }
        return Rates(
            grown["generated_tokens"] / seconds,
            grown["prompt_tokens"] / seconds,
            grown["prefix_queries"],
            grown["prefix_hits"],
        )

    def busy_share(self, number: int, rank: int) -> float | None:
        """Return the share of time in which a rank computed steps; None while it is not known.

        Engines report the busy time of ranks every few seconds, so it takes two statuses with new values.
        """
        known = self._ranks.get((number, rank))
        return known.share if known is not None else None

    def _add_ranks(self, status: Status) -> None:
        now = status["uptime_s"]
        for replica in status["replicas"]:
            for rank in replica["stats"]["ranks"] if replica["stats"] else ():
                key = (replica["number"], rank["rank"])
                if key not in self._ranks or self._ranks[key].pid != rank["pid"]:
                    self._ranks[key] = _Rank(rank["pid"], rank["busy_us"], now)
                self._ranks[key].add(now, rank["busy_us"])

    def _seconds(self) -> float:
        """Return the time between the oldest and the newest status."""
        seconds: float = self._statuses[-1]["uptime_s"] - self._statuses[0]["uptime_s"]
        return seconds

    def _stats(self, at: int, number: int) -> Any:
        """Return the statistics of a replica in the status at position `at`; None if there are none."""
        replicas = self._statuses[at]["replicas"]
        return next((each["stats"] for each in replicas if each["number"] == number), None)
