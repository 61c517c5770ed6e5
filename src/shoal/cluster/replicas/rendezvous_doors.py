"""The doors of a rendezvous through which replicas of other hosts join a front end, or compare their agreement."""

import socket
from collections.abc import Callable, Collection, Mapping

from shoal.cluster.replicas.connected_replica import ConnectedReplica
from shoal.errors import EngineError, UserError
from shoal.log import get_logger
from shoal.transport.channel import Channel
from shoal.transport.rendezvous import describe_difference
from shoal.wire.base import WireError
from shoal.wire.hosts import HostReport, host_report_decoder
from shoal.wire.plan import EnginePlan
from shoal.wire.rendezvous import Hello, JoinRefused

log = get_logger("fleet")

_MAX_NAMED = 8  # replicas that an error names

MakePlan = Callable[[int, int, HostReport], EnginePlan]
"""A function that plans a replica for its host, from its number, the number of all replicas, and the host's report.

It raises a UserError if the host cannot run the replica.
"""


class FleetDoor:
    """A door that lets in the replicas that a fleet awaits, one of each number, and sends each its plan."""

    def __init__(
        self,
        *,
        size: int,
        awaited: Collection[int],
        agreement: Mapping[str, str],
        make_plan: MakePlan,
        answer_timeout: float,
    ) -> None:
        """Make a door that is shut until `open` is called.

        Args:
            size: the number of all replicas.
            awaited: the numbers of the replicas that other hosts start.
            agreement: what a host must have in common with this one.
            answer_timeout: seconds within which a replica must answer.
        """
        self._size = size
        self._awaited = awaited
        self._agreement = agreement
        self._make_plan = make_plan
        self._answer_timeout = answer_timeout
        self._arrive: Callable[[int, ConnectedReplica], None] | None = None
        self._plans: dict[int, EnginePlan] = {}  # of replicas that are about to enter
        self._present: dict[int, ConnectedReplica] = {}
        self._name = f"the front end ({socket.gethostname()})"

    def open(self, arrive: Callable[[int, ConnectedReplica], None]) -> None:
        """Let replicas in from now on, and hand each to `arrive`, on the thread of the rendezvous."""
        self._arrive = arrive

    def objection(self, hello: Hello) -> JoinRefused | None:
        if self._arrive is None:
            return JoinRefused(f"{self._name} is still starting", again=True)
        if hello.size != self._size:
            return JoinRefused(
                f"it expects {hello.size} replicas, but {self._name} expects {self._size}: give all hosts the same "
                "--data-parallel-size"
            )
        if hello.rank not in self._awaited:
            awaited = ", ".join(map(str, sorted(self._awaited)[:_MAX_NAMED]))
            awaited += ", ..." if len(self._awaited) > _MAX_NAMED else ""
            return JoinRefused(
                f"{self._name} does not await replica {hello.rank}, but {awaited}: see --data-parallel-start-rank and "
                "--data-parallel-size-local"
            )
        why = describe_difference(hello.agreement, self._agreement, self._name)
        if why:
            return JoinRefused(why)
        present = self._present.get(hello.rank)
        if present is not None and present.connected:
            # It may have lost its connection without this process having noticed yet.
            why = f"{present.name} is connected already: give every replica a number of its own"
            return JoinRefused(why, again=True)
        return self._plan(hello)

    def _plan(self, hello: Hello) -> JoinRefused | None:
        """Plan the replica, for `enter` to send."""
        try:
            report = host_report_decoder.decode(hello.report)
            self._plans[hello.rank] = self._make_plan(hello.rank, hello.size, report)
        except (UserError, WireError) as error:
            log.warning("replica %d cannot run on %s: %s", hello.rank, hello.host, error)
            return JoinRefused(str(error))
        return None

    def enter(self, hello: Hello, channel: Channel) -> None:
        assert self._arrive is not None
        plan = self._plans.pop(hello.rank)
        try:
            replica = ConnectedReplica(hello, channel, plan, answer_timeout=self._answer_timeout)
        except EngineError as error:
            log.warning("%s, before it had its plan", error)
            return
        self._present[hello.rank] = replica
        self._arrive(hello.rank, replica)


class PeersDoor:
    """A door at which replicas that each host serves itself compare their agreement, and leave again."""

    def __init__(self, *, size: int, agreement: Mapping[str, str]) -> None:
        self._size = size
        self._agreement = agreement
        self._name = f"replica 0 ({socket.gethostname()})"

    def objection(self, hello: Hello) -> JoinRefused | None:
        if hello.size != self._size:
            return JoinRefused(f"it expects {hello.size} replicas, but {self._name} expects {self._size}")
        why = describe_difference(hello.agreement, self._agreement, self._name)
        return JoinRefused(why) if why else None

    def enter(self, hello: Hello, channel: Channel) -> None:
        channel.close()
