"""The traces that several replicas record at the same time."""

from collections.abc import Collection
from typing import Protocol

from shoal.cluster.replicas.replica_client import ReplicaClient
from shoal.errors import EngineError
from shoal.wire.trace import TraceEvents


class TracedReplicas(Protocol):
    """The replicas that record."""

    def live_replica(self, number: int) -> ReplicaClient | None: ...

    def live_numbers(self) -> Collection[int]: ...

    def lose(self, number: int, error: EngineError) -> None: ...


class ReplicaTraces:
    """The recording of all replicas: those that join later take part, and those that end leave what they have sent."""

    def __init__(self, replicas: TracedReplicas) -> None:
        self._replicas = replicas
        self._limit = 0  # the most events of each replica; 0: nothing is recorded
        self._awaited: set[int] = set()  # replicas that were told to end their traces, and have not answered
        self._recorded: list[TraceEvents] = []

    def begin(self, limit: int) -> None:
        """Have all replicas record. What is left of an earlier trace is dropped."""
        self._limit = limit
        self._awaited.clear()
        self._recorded.clear()
        for number in list(self._replicas.live_numbers()):
            self.admitted(number)

    def end(self) -> None:
        """Have all replicas end their traces. `has_ended` shows when they have."""
        self._limit = 0
        for number in list(self._replicas.live_numbers()):
            replica = self._replicas.live_replica(number)
            if replica is None:  # it was lost together with another one
                continue
            try:
                if replica.tell_trace_end():
                    self._awaited.add(number)
            except EngineError as error:
                self._replicas.lose(number, error)

    @property
    def has_ended(self) -> bool:
        return not self._limit and not self._awaited

    def admitted(self, number: int) -> None:
        """Note that a replica has joined."""
        replica = self._replicas.live_replica(number)
        if not self._limit or replica is None:
            return
        try:
            replica.begin_trace(self._limit)
        except EngineError as error:
            self._replicas.lose(number, error)

    def lost(self, number: int, replica: ReplicaClient) -> None:
        """Note that a replica has left. What it has sent before is kept."""
        self._recorded += replica.take_trace()
        self._awaited.discard(number)

    def collect(self, number: int, replica: ReplicaClient) -> None:
        """Take what a replica has sent."""
        for events in replica.take_trace():
            self._recorded.append(events)
            if events.last:
                self._awaited.discard(number)

    def take(self) -> list[TraceEvents]:
        recorded, self._recorded = self._recorded, []
        return recorded
