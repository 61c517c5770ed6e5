"""What a fleet knows of the replica with one number, across its restarts."""

from dataclasses import dataclass

from shoal.cluster.members.supervised import Supervised
from shoal.cluster.replica_set import ReplicaClient
from shoal.cluster.stats import carried, emptied
from shoal.errors import EngineError, ShoalError
from shoal.wire.engine import EngineStats
from shoal.wire.fleet import ReplicaStatus


@dataclass(slots=True, kw_only=True)
class SupervisedReplica(Supervised):
    """The replica with this number. Its counters go on from run to run."""

    number: int
    past: EngineStats | None = None  # counters of its former runs
    member: ReplicaClient | None = None  # None: it does not run
    host: str = ""
    pid: int = 0
    first: EngineStats | None = None  # its stats when it was ready
    _before: EngineStats | None = None  # counters of its former runs but for the last one
    _returning: bool = False  # the engine of the last run is back, with its own counters
    _latest: EngineStats | None = None  # of this run
    _messages_seen: int = 0  # `num_messages` when it was last listened to
    _quiet: float = 0.0  # seconds since then, with requests

    @property
    def local(self) -> bool:
        """Whether this host starts it."""
        return not self.elsewhere

    @property
    def stats(self) -> EngineStats | None:
        """The newest stats of this run, with the counters of all runs."""
        if self.first is not None and self.member is not None and self.member.snapshot is not None:
            self._latest = self.member.snapshot
        if self._latest is None:
            return self.past
        return self._latest if self.past is None else carried(self.past, self._latest)

    def status(self, now: float, held: int) -> ReplicaStatus:
        return ReplicaStatus(
            number=self.number,
            state=self.state.value,
            host=self.host,
            pid=self.pid,
            since_s=now - self.since,
            restarts=self.num_restarts,
            cause=self.error.reason if isinstance(self.error, EngineError) else str(self.error or ""),
            held=held,
            stats=self.stats,
        )

    def take_over(self, member: ReplicaClient, host: str, pid: int) -> None:
        """Take a replica that has arrived from another host: a new one, or the last one again, which was cut off."""
        self._returning = self.was_ready and (self.host, self.pid) == (host, pid)
        self.member, self.host, self.pid = member, host, pid

    def note_first(self, stats: EngineStats) -> None:
        """Note that it says it is ready."""
        self.first = self._latest = stats

    def admit(self, member: ReplicaClient, now: float) -> None:
        """Note that it is given requests from now on."""
        if self._returning:
            self.past, self._returning = self._before, False
        self._messages_seen, self._quiet = member.num_messages, 0.0
        self.became_ready(now)

    def listen(self, member: ReplicaClient, *, held: int, passed: float) -> float:
        """Return the seconds for which it has held requests and said nothing; `passed` since the last call."""
        if not held or member.num_messages != self._messages_seen:
            self._messages_seen, self._quiet = member.num_messages, 0.0
        else:
            self._quiet += passed
        return self._quiet

    def close_run(self, error: ShoalError) -> None:
        """Keep the counters of a run that has ended, and forget the rest of it."""
        stats = self.stats
        if self._latest is not None and stats is not None and not self._returning:
            self._before, self.past = self.past, emptied(stats)
        self.first = self._latest = self.member = None
        self.error = error
