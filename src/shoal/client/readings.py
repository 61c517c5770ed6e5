"""What a server's status says, and what two readings of it say together: rates and shares of time."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import UserError

SPAN_S = 4.0  # rates are over so long, where readings go back so far
BUSY_SPAN_S = 15.0  # ... and those of ranks, whose numbers come every few seconds
QUIET_S = 8.0  # a rank whose numbers stay the same for so long is idle
ALIVE = ("ready", "leaving")
Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one replica, or of all: tokens a second, and the tokens looked up in the prefix cache and found there."""

    generated: float
    prompt: float
    queries: int
    hits: int


@dataclass(slots=True)
class _Rank:
    """`news`: (server's time, microseconds busy) of readings in which there was something new."""

    pid: int
    busy_us: int
    quiet_since: float
    news: deque[tuple[float, int]] = field(default_factory=deque)
    share: float | None = None

    def see(self, now: float, busy_us: int) -> None:
        if busy_us != self.busy_us:
            self.busy_us, self.quiet_since = busy_us, now
            self.news.append((now, busy_us))
            while len(self.news) > 2 and now - self.news[1][0] >= BUSY_SPAN_S:
                self.news.popleft()
            seconds = now - self.news[0][0]
            if seconds:
                self.share = max(0.0, min(1.0, (busy_us - self.news[0][1]) / 1e6 / seconds))
        elif now - self.quiet_since > QUIET_S:
            self.news.clear()
            self.share = 0.0


class Readings:
    """The last readings, as far back as rates need them. The server's `uptime_s` is their clock, so that it does not
    matter how long an answer was on its way."""

    def __init__(self) -> None:
        self._readings: deque[Status] = deque()
        self._ranks: dict[tuple[int, int], _Rank] = {}

    def add(self, status: Any) -> None:
        """
        Raises:
            UserError: this is no status.
        """
        if not isinstance(status, Mapping) or not {"replicas", "uptime_s", "tp", "pp"} <= set(status):
            raise UserError("the server's /v1/admin/status is of another kind: is it a server of this version?")
        if self._readings and status["uptime_s"] < self._readings[-1]["uptime_s"]:  # it was started anew
            self._readings.clear()
            self._ranks.clear()
        self._readings.append(status)
        while len(self._readings) > 2 and status["uptime_s"] - self._readings[1]["uptime_s"] >= SPAN_S:
            self._readings.popleft()
        self._see_ranks(status)

    @property
    def latest(self) -> Status:
        return self._readings[-1]

    def growth(self) -> Growth | None:
        """Of all replicas; None as long as there is one reading only."""
        parts = [part for each in self.latest["replicas"] if (part := self.growth_of(each["number"])) is not None]
        if not self._seconds():
            return None
        return Growth(
            sum(part.generated for part in parts),
            sum(part.prompt for part in parts),
            sum(part.queries for part in parts),
            sum(part.hits for part in parts),
        )

    def growth_of(self, number: int) -> Growth | None:
        """None if the replica is not in both readings."""
        before, now, seconds = self._stats(0, number), self._stats(-1, number), self._seconds()
        if before is None or now is None or not seconds:
            return None
        grown = {
            name: max(0, now[name] - before[name])
            for name in ("generated_tokens", "prompt_tokens", "prefix_queries", "prefix_hits")
        }
        return Growth(
            grown["generated_tokens"] / seconds,
            grown["prompt_tokens"] / seconds,
            grown["prefix_queries"],
            grown["prefix_hits"],
        )

    def busy(self, number: int, rank: int) -> float | None:
        """The share of its time that a rank was in steps; None as long as nobody knows. Engines pass on what ranks say
        every few seconds, so that two readings in which there was something new are needed."""
        seen = self._ranks.get((number, rank))
        return seen.share if seen is not None else None

    def _see_ranks(self, status: Status) -> None:
        now = status["uptime_s"]
        for replica in status["replicas"]:
            for rank in replica["stats"]["ranks"] if replica["stats"] else ():
                key = (replica["number"], rank["rank"])
                if key not in self._ranks or self._ranks[key].pid != rank["pid"]:
                    self._ranks[key] = _Rank(rank["pid"], rank["busy_us"], now)
                self._ranks[key].see(now, rank["busy_us"])

    def _seconds(self) -> float:
        found: float = self._readings[-1]["uptime_s"] - self._readings[0]["uptime_s"]
        return found

    def _stats(self, at: int, number: int) -> Any:
        """None where nothing is known of the replica."""
        replicas = self._readings[at]["replicas"]
        return next((each["stats"] for each in replicas if each["number"] == number), None)
