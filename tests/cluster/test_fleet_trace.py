"""Traces of a fleet: which replicas record, and when a trace ends."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from shoal.cluster.fleet import Fleet, ModelSummary
from shoal.cluster.fleet_trace import FleetTrace
from shoal.cluster.limits import FleetLimits
from shoal.cluster.replicas.replica_client import ReplicaClient
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.errors import ConfigError, ShoalError
from shoal.trace import clocks
from shoal.trace.target import TraceTarget
from shoal.wire.trace import SAME_CLOCK, TraceEvents, TraceSummary, TrackEvents, trace_summary_decoder
from support.fake_replica import FakeReplica
from support.fakes import request
from support.traces import Trace

LIMIT = 50


class SilentChannel:
    """A channel that is never readable."""

    backlog = False

    def fileno(self) -> int:
        return -1


class UnwaitingFleet(Fleet):
    """A fleet that never waits: messages of fake replicas come from no socket."""

    def _wait_for_any(self, replicas: Sequence[ReplicaClient], timeout: float) -> None: ...


class World:
    """A fleet of two fake replicas, which are started again when they die."""

    def __init__(self) -> None:
        self.started: list[FakeReplica] = []
        self.fleet = UnwaitingFleet(
            self._launch,
            lambda stats: ReplicaCapacity(100, 10**6, 4, 100),
            model=ModelSummary("model", 1, 1),
            limits=FleetLimits(1000, None, None, 5, 60.0),
            local=[0, 1],
        )
        self.run()

    def _launch(self, number: int, generation: int) -> FakeReplica:
        self.started.append(FakeReplica(number))
        return self.started[-1]

    def run(self) -> None:
        for _ in range(3):
            self.fleet.updates(0)


@pytest.fixture
def world() -> Iterator[World]:
    found = World()
    yield found
    found.fleet.close()


def finish(trace: FleetTrace, world: World) -> TraceSummary:
    """End the trace, and return its summary."""
    outcomes: list[bytes | ShoalError] = []
    trace.stop(outcomes.append)
    while not outcomes:
        world.fleet.updates(0)
        trace.tick()
    assert isinstance(outcomes[0], bytes)
    return trace_summary_decoder.decode(outcomes[0])


def test_replicas_that_come_later_record_too(world: World, tmp_path: Path) -> None:
    trace = FleetTrace(world.fleet, TraceTarget.of(str(tmp_path / "run.json")), LIMIT, "model")
    assert [replica.traces for replica in world.started] == [[LIMIT], [LIMIT]]
    world.started[0].recorded.append(TraceEvents(0, (engine_track(),), (SAME_CLOCK,), ((clocks.now(), "all is well"),)))
    world.started[0].dead = "killed"
    while len(world.started) < 3 or not world.started[2].traces:
        world.run()
        trace.tick()
    summary = finish(trace, world)
    assert [replica.traces for replica in world.started] == [[LIMIT], [LIMIT, 0], [LIMIT, 0]]
    assert summary.note == ""
    found = Trace(Path(summary.file))
    assert [each["name"] for each in found.events if each["ph"] == "i"] == ["all is well"]  # it had sent that before
    world.started[1].dead = "killed"
    while len(world.started) < 4:
        world.run()
    world.run()
    assert world.started[3].traces == []  # no trace is recorded any more


def engine_track() -> TrackEvents:
    return TrackEvents(-1, "engine", "host", 1, clocks.clock_identity(), 1, 2, b"", ())


def test_a_trace_ends_without_a_replica_that_does_not_answer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.cluster.fleet_trace.END_S", 0.0)
    trace = FleetTrace(world.fleet, TraceTarget.of(str(tmp_path)), LIMIT, "model")
    assert world.started[0].traces == []
    trace.start()
    with pytest.raises(ConfigError, match="a trace is recorded already"):
        trace.start()
    world.fleet.add(request(1, [1, 2], 3))
    while world.fleet.num_unfinished:
        world.run()
    world.started[1].silent = True
    summary = finish(trace, world)
    assert summary.note == "a replica has not sent the rest of its events"
    found = Trace(Path(summary.file))
    assert found.facts["notes"] == [summary.note]
    assert [each.name for each in found.of("request")][:1] == ["request 1"]
    refused: list[bytes | ShoalError] = []
    trace.stop(refused.append)
    assert isinstance(refused[0], ConfigError)


def test_replicas_stop_recording_at_the_limit(world: World, tmp_path: Path) -> None:
    trace = FleetTrace(world.fleet, TraceTarget.of(str(tmp_path / "run.json")), 1, "model")
    world.started[1].recorded.append(TraceEvents(1, (engine_track(),), (SAME_CLOCK,)))
    while world.started[1].traces == [1]:
        world.fleet.updates(0)
        trace.tick()
    assert [replica.traces for replica in world.started] == [[1, 0], [1, 0]]
    assert finish(trace, world).note.startswith("the trace ends at the limit of 1 events")
    trace.start()
    trace.close()  # as the end of the fleet does
    assert Trace(tmp_path / "run-1.json").events == []


def test_a_replica_that_dies_while_a_trace_ends_is_not_awaited(world: World, tmp_path: Path) -> None:
    trace = FleetTrace(world.fleet, TraceTarget.of(str(tmp_path / "run.json")), LIMIT, "model")
    world.started[0].dead = "killed"
    assert finish(trace, world).note == ""
