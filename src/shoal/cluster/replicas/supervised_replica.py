"""The state that a fleet keeps of a replica across its restarts."""

from dataclasses import dataclass

from shoal.cluster.replicas.replica_client import ReplicaClient
from shoal.cluster.replicas.supervised import Supervised
from shoal.cluster.stats import add_past_counters, keep_counters
from shoal.errors import EngineError, ShoalError
from shoal.wire.engine import EngineStats
from shoal.wire.fleet import ReplicaStatus


@dataclass(slots=True, kw_only=True)
class SupervisedReplica(Supervised):
    """The replica with one number, over all its runs. A run lasts from one start to the next."""

    number: int
    past: EngineStats | None = None  # counters of its past runs
    member: ReplicaClient | None = None  # the replica in its present run; None: it does not run
    host: str = ""
    pid: int = 0
    first_stats: EngineStats | None = None  # its stats when it became ready in this run
    _past_before_last: EngineStats | None = None  # counters of its past runs without the last one
    _returning: bool = False  # True: the engine of the last run is back, and counts on
    _latest: EngineStats | None = None  # the latest stats of this run
    _messages_seen: int = 0  # the number of messages when `silent_for` was called last
    _silent_s: float = 0.0  # seconds with requests and without a message

    @property
    def local(self) -> bool:
        """True if this host starts it."""
        return not self.started_elsewhere

    @property
    def stats(self) -> EngineStats | None:
        """The newest stats of this run, with the counters of all runs."""
        if self.first_stats is not None and self.member is not None and self.member.snapshot is not None:
            self._latest = self.member.snapshot
        if self._latest is None:
            return self.past
        return self._latest if self.past is None else add_past_counters(self.past, self._latest)

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
        """Take a replica that has arrived from another host.

        It may be the replica of the last run, whose connection was lost.
        """
        self._returning = self.was_ready and (self.host, self.pid) == (host, pid)
        self.member, self.host, self.pid = member, host, pid

    def note_first(self, stats: EngineStats) -> None:
        """Note the stats with which it reported that it is ready."""
        self.first_stats = self._latest = stats

    def admit(self, member: ReplicaClient, now: float) -> None:
        """Note that it gets requests from now on."""
        if self._returning:
            self.past, self._returning = self._past_before_last, False
        self._messages_seen, self._silent_s = member.num_messages, 0.0
        self.became_ready(now)

    def silent_for(self, member: ReplicaClient, *, held: int, passed: float) -> float:
        """Return for how many seconds it has had requests and sent no message.

        Args:
            held: how many requests it has now.
            passed: the seconds since the last call.
        """
        if not held or member.num_messages != self._messages_seen:
            self._messages_seen, self._silent_s = member.num_messages, 0.0
        else:
            self._silent_s += passed
        return self._silent_s

    def close_run(self, error: ShoalError) -> None:
        """Note that the present run has ended. Of its stats only the counters are kept."""
        stats = self.stats
        if self._latest is not None and stats is not None and not self._returning:
            self._past_before_last, self.past = self.past, keep_counters(stats)
        self.first_stats = self._latest = self.member = None
        self.error = error
