"""Replicas of other hosts: the door through which they join, broken connections and malformed messages."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from shoal.cluster.replicas.connected_replica import ConnectedReplica
from shoal.cluster.replicas.rendezvous_doors import FleetDoor, PeersDoor
from shoal.errors import ConfigError, EngineError, UserError
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.wire.base import Stop, Wire, encode, replace_fields
from shoal.wire.engine import EngineFailure, EngineStats, SeqUpdate, ToEngine, Updates, to_engine
from shoal.wire.hosts import HostFacts, HostReport
from shoal.wire.plan import EnginePlan, ModelFiles, ModelPlan, ReplicaPlace
from shoal.wire.rendezvous import Hello
from support.plans import bare_plan, host

AGREED = {"version of Shoal": "1", "config.json": "abc"}
REPORT = HostReport(HostFacts("there", host()), ModelFiles("/there"), "/there", {}, 0, 2)


def hello(rank: int = 2, **changes: Any) -> Hello:
    return replace_fields(Hello("front end", rank, 4, "there", 77, b"", AGREED, encode(REPORT)), **changes)


@dataclass(slots=True)
class Connection:
    """A replica, and the engine's end of its connection."""

    replica: ConnectedReplica
    engine: Channel

    def send(self, message: Wire | bytes) -> None:
        self.engine.send(message if isinstance(message, bytes) else encode(message))

    def receive(self) -> list[ToEngine]:
        """Return the messages that the engine receives; [] if the connection has ended."""
        assert wait([self.engine], 60)
        try:
            return [to_engine.decode(frame) for frame in self.engine.receive()]
        except ChannelClosed:
            return []


@pytest.fixture
def connection() -> Iterator[Connection]:
    ours, theirs = socket.socketpair()
    found = Connection(ConnectedReplica(hello(), Channel(ours), bare_plan(), answer_timeout=60), Channel(theirs))
    assert found.receive() == [bare_plan()], "its plan comes first"
    yield found
    found.replica.close()
    found.engine.close()


def stats() -> EngineStats:
    zeros: Any = [0] * 17
    return EngineStats(*zeros)


def updates(*tokens: int) -> Updates:
    return Updates((SeqUpdate(1, tokens),))


def test_a_replica_is_ready_when_it_sends_stats(connection: Connection) -> None:
    assert connection.replica.ready(0) is None
    connection.send(stats())
    assert connection.replica.ready(60) == stats()
    connection.send(updates(5))
    assert [update.tokens for update in connection.replica.updates(60)] == [(5,)]


def test_a_replica_has_failed_if_its_connection_ends(connection: Connection) -> None:
    connection.engine.close()
    with pytest.raises(EngineError, match=r"replica 2 \(there, process 77\) ended, or lost its connection"):
        connection.replica.updates(60)
    assert connection.replica.died


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x81\xa4type\xa4Stop", bytes(range(255, 191, -1))])
def test_a_replica_that_sends_malformed_data_has_failed(connection: Connection, data: bytes) -> None:
    connection.send(data)
    with pytest.raises(EngineError, match=r"replica 2 \(there, process 77\) sent a message that cannot be decoded"):
        connection.replica.updates(60)
    assert connection.receive() == []


@pytest.mark.parametrize("token", [-1, 2**31, 2**63])
def test_a_replica_that_sends_an_impossible_token_has_failed(connection: Connection, token: int) -> None:
    connection.send(updates(3, token))
    with pytest.raises(EngineError, match=f"sent {token}, which is no token"):
        connection.replica.updates(60)


def test_a_frame_of_impossible_length_is_not_waited_for(connection: Connection) -> None:
    os.write(connection.engine.fileno(), b"\xff\xff\xff\xff")
    with pytest.raises(EngineError, match="ended, or lost its connection"):
        connection.replica.updates(60)


def test_an_error_of_the_engine_is_reported_with_the_name_of_the_replica(connection: Connection) -> None:
    connection.send(EngineFailure("no memory", user_error=True))
    with pytest.raises(UserError, match=r"replica 2 \(there, process 77\): no memory"):
        connection.replica.ready(60)


@pytest.mark.parametrize("first", [updates(5), stats()])
def test_a_failure_right_after_other_messages_is_raised_by_the_next_call(connection: Connection, first: Wire) -> None:
    """By then the connection is closed."""
    frames = [encode(first), encode(EngineFailure("no memory"))]
    os.write(connection.engine.fileno(), b"".join(struct.pack("<I", len(frame)) + frame for frame in frames))
    if isinstance(first, Updates):
        assert [update.tokens for update in connection.replica.updates(60)] == [(5,)]
    else:
        assert connection.replica.ready(60) == first
    connection.replica.close()
    assert connection.replica.channel.fileno() < 0
    assert wait([connection.replica.channel], 60) == [connection.replica.channel]
    with pytest.raises(EngineError, match=r"replica 2 \(there, process 77\): no memory"):
        connection.replica.updates(0) if isinstance(first, Updates) else connection.replica.ready(0)


def test_when_a_front_end_closes_the_engine_only_loses_the_connection(connection: Connection) -> None:
    begun = time.monotonic()
    connection.replica.close()
    assert connection.receive() == []
    assert time.monotonic() - begun < 30
    assert not connection.replica.connected


def test_a_replica_that_is_dismissed_is_told_to_stop(connection: Connection) -> None:
    connection.replica.dismiss()
    assert connection.receive() == [Stop()]
    assert not connection.replica.has_ended
    connection.send(updates(3))  # of a step that was in flight
    connection.engine.shut_down()
    for _ in range(600):
        if connection.replica.has_ended:
            return
        wait([connection.replica.channel], 0.1)
    raise AssertionError("the end is not noticed")


@dataclass(slots=True)
class Arrived:
    replicas: list[tuple[int, ConnectedReplica]] = field(default_factory=list)

    def __call__(self, number: int, replica: ConnectedReplica) -> None:
        self.replicas.append((number, replica))


def make_plan(number: int, size: int, report: HostReport) -> EnginePlan:
    """Return a plan that shows its arguments; the host `small` is too small for a replica."""
    if report.facts.name == "small":
        raise ConfigError("2 ranks need 4 GiB, 1 GiB more than this host has available")
    place = ReplicaPlace(number, size, local_rank=report.local_rank, local_size=report.local_size)
    return bare_plan(place=place, model=ModelPlan(report.files.folder))


def door() -> FleetDoor:
    return FleetDoor(size=4, awaited=[2, 3], agreement=AGREED, make_plan=make_plan, answer_timeout=60)


def test_a_door_is_shut_until_the_fleet_opens_it() -> None:
    refused = door().objection(hello())
    assert refused is not None
    assert refused.again


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"size": 8},
            "it expects 8 replicas, but the front end .* expects 4: give all hosts the same --data-parallel-size",
        ),
        ({"rank": 1}, "does not await replica 1, but 2, 3: see --data-parallel-start-rank"),
        ({"rank": -1}, "does not await replica -1"),
        (
            {"agreement": {**AGREED, "version of Shoal": "2"}},
            "its version of Shoal is 2, that of the front end .* is 1",
        ),
        ({"agreement": {"version of Shoal": "1"}}, "its config.json is nothing, that of the front end .* is abc"),
    ],
)
def test_a_replica_that_differs_is_refused_with_the_difference(changes: dict[str, Any], why: str) -> None:
    found = door()
    found.open(Arrived())
    refused = found.objection(hello(**changes))
    assert refused is not None
    assert not refused.again
    with pytest.raises(ValueError, match=why):
        raise ValueError(refused.why)


def test_each_replica_gets_the_plan_for_its_host() -> None:
    found, arrived = door(), Arrived()
    found.open(arrived)
    introduced = hello(3, report=encode(replace_fields(REPORT, local_rank=1)))
    assert found.objection(introduced) is None
    ours, theirs = socket.socketpair()
    with theirs:
        found.enter(introduced, Channel(ours))
        (plan,) = (to_engine.decode(frame) for frame in Channel(theirs).receive())
    assert isinstance(plan, EnginePlan)
    assert plan.place == ReplicaPlace(3, 4, local_rank=1, local_size=2)
    assert plan.model.folder == "/there"
    ((_, replica),) = arrived.replicas
    replica.close()


def test_a_host_that_cannot_run_a_replica_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    found = door()
    found.open(Arrived())
    small = replace_fields(REPORT, facts=HostFacts("small", host()))
    refused = found.objection(hello(report=encode(small)))
    assert refused is not None
    assert not refused.again
    assert refused.why == "2 ranks need 4 GiB, 1 GiB more than this host has available"
    assert caplog.messages == [f"replica 2 cannot run on there: {refused.why}"]
    unreadable = found.objection(hello(report=b"\xff"))
    assert unreadable is not None
    assert not unreadable.again


def test_a_replica_that_hangs_up_before_it_has_its_plan_may_come_again() -> None:
    found, arrived = door(), Arrived()
    found.open(arrived)
    assert found.objection(hello()) is None
    ours, theirs = socket.socketpair()
    theirs.close()
    found.enter(hello(), Channel(ours))
    for _, replica in arrived.replicas:  # the kernel may accept what is sent, and report the end later
        replica.close()
    assert found.objection(hello()) is None


def test_a_number_may_be_used_again_when_its_connection_has_ended() -> None:
    found, arrived = door(), Arrived()
    found.open(arrived)
    assert found.objection(hello()) is None
    ours, theirs = socket.socketpair()
    with theirs:
        found.enter(hello(), Channel(ours))
        second = found.objection(hello(pid=78))
        assert second is not None
        assert second.again
        assert "replica 2 (there, process 77) is connected already" in second.why
        assert found.objection(hello(3)) is None
    ((number, replica),) = arrived.replicas
    assert number == 2
    with pytest.raises(EngineError):
        replica.updates(60)
    replica.close()
    assert found.objection(hello(pid=78)) is None


def test_peers_compare_their_agreement_and_leave() -> None:
    found = PeersDoor(size=4, agreement=AGREED)
    assert found.objection(hello()) is None
    ours, theirs = socket.socketpair()
    with theirs:
        found.enter(hello(), Channel(ours))
        assert theirs.recv(1) == b""
    differs = found.objection(hello(agreement={**AGREED, "config.json": "xyz"}))
    assert differs is not None
    assert "its config.json is xyz, that of replica 0" in differs.why
    smaller = found.objection(hello(size=2))
    assert smaller is not None
    assert "it expects 2 replicas" in smaller.why
