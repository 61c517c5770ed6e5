"""One replica's number, through all the lives of whoever bears it."""

from dataclasses import dataclass
from enum import StrEnum

from shoal.cluster.members.restarts import Restarts
from shoal.cluster.replica_set import ReplicaClient
from shoal.cluster.stats import carried, emptied
from shoal.errors import ShoalError
from shoal.wire.engine import EngineStats
from shoal.wire.fleet import ReplicaStatus


class SlotState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it has ended, and waits for its next start
    AWAITED = "awaited"  # another host starts it
    LEAVING = "leaving"
    FAILED = "failed"


@dataclass(slots=True)
class Slot:
    """What is known of the replica of a number. Its counters go on from life to life."""

    number: int
    local: bool
    restarts: Restarts
    state: SlotState
    since: float
    past: EngineStats | None = None  # counters of its former lives
    member: ReplicaClient | None = None
    host: str = ""
    pid: int = 0
    error: ShoalError | None = None  # its last end
    next_start: float = 0.0
    was_ready: bool = False
    first: EngineStats | None = None  # what it said when it was ready
    _before: EngineStats | None = None  # counters of its former lives but for the last one
    _returning: bool = False  # the engine of the last life is back, with its own counters
    _latest: EngineStats | None = None  # of this life
    _words: int = 0  # that it had said when it was listened to last
    _quiet: float = 0.0  # seconds since then, with requests

    @property
    def stats(self) -> EngineStats | None:
        """The newest of this life and, in its counters, of all lives."""
        if self.first is not None and self.member is not None and self.member.snapshot is not None:
            self._latest = self.member.snapshot
        if self._latest is None:
            return self.past
        return self._latest if self.past is None else carried(self.past, self._latest)

    def shown(self, now: float, held: int) -> ReplicaStatus:
        return ReplicaStatus(
            number=self.number,
            state=self.state.value,
            host=self.host,
            pid=self.pid,
            since_s=now - self.since,
            restarts=self.restarts.count,
            cause="" if self.error is None else str(self.error),
            held=held,
            stats=self.stats,
        )

    def enter(self, state: SlotState, now: float) -> None:
        self.state = state
        self.since = now

    def take_over(self, member: ReplicaClient, host: str, pid: int) -> None:
        """A replica of another host has arrived: a new one, or the last one again, which was cut off for a while."""
        self.restarts.count += self.was_ready
        self._returning = self.was_ready and (self.host, self.pid) == (host, pid)
        self.member, self.host, self.pid = member, host, pid

    def say_ready(self, stats: EngineStats) -> None:
        self.first = self._latest = stats

    def admit(self, member: ReplicaClient) -> None:
        """Requests go to it from now on."""
        if self._returning:
            self.past, self._returning = self._before, False
        self.was_ready = True
        self._words, self._quiet = member.words, 0.0

    def listen(self, member: ReplicaClient, *, held: int, passed: float) -> float:
        """Seconds for which it has held requests and said nothing; `passed` since it was listened to last."""
        if not held or member.words != self._words:
            self._words, self._quiet = member.words, 0.0
        else:
            self._quiet += passed
        return self._quiet

    def end(self, error: ShoalError) -> None:
        stats = self.stats
        if self._latest is not None and stats is not None and not self._returning:
            self._before, self.past = self.past, emptied(stats)
        self.first = self._latest = self.member = None
        self.error = error
