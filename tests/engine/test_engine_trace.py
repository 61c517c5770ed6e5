"""What an engine collects from its ranks for a trace."""

from array import array
from collections.abc import Sequence

import pytest

from shoal.engine import engine_trace
from shoal.engine.engine_trace import EngineTrace
from shoal.trace.clocks import clock_identity, now
from shoal.trace.event_buffer import EventBuffer
from shoal.wire.base import encode
from shoal.wire.ranks import StepPlan
from shoal.wire.trace import END, ROW, TRACE, EventKind, TraceEvents, TrackEvents

AHEAD = 10**12
PLAN = StepPlan(1, 7, ())


class Ranks:
    """Two ranks, each of which has recorded some events whenever it is asked. The second one has another clock."""

    def __init__(self, events: int = 3) -> None:
        self.asked: list[bytes] = []
        self.events = events
        self.replaced = False  # True: they are being replaced, and answer nothing

    def __call__(self, verb: str, payload: bytes) -> Sequence[bytes]:
        assert verb == TRACE
        self.asked.append(payload)
        return [] if self.replaced else [self._answer(0, clock_identity(), 0), self._answer(1, "another", AHEAD)]

    def _answer(self, rank: int, clock: str, ahead: int) -> bytes:
        buffer = EventBuffer()
        asked = now() + ahead
        for step in range(self.events):
            buffer.add(EventKind.STEP, asked, asked, step)
        rows, names, _ = buffer.take()
        return encode(TrackEvents(rank, f"rank {rank}", "host", 1, clock, asked, now() + ahead, rows, names))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks be asked whenever there was work."""
    monkeypatch.setattr(engine_trace, "PERIOD_NS", 0)


def kinds(events: TraceEvents, track: int = 0) -> list[EventKind]:
    rows = array("q")
    rows.frombytes(events.tracks[track].rows)
    return [EventKind(kind) for kind in rows[::ROW]]


def test_the_clocks_of_other_hosts_are_measured_at_the_start(at_once: None) -> None:
    ranks = Ranks(events=0)
    trace = EngineTrace(ranks, 3, 1000)
    assert len(ranks.asked) > 1  # a question that need not wait for a step tells most
    (first,) = trace.take()
    assert (first.replica, first.last, first.tracks[0].title) == (3, False, "engine")
    assert first.tracks[0].asked_ns  # it answers the order to begin
    same, other = first.offsets[1:3]
    assert (same.ns, same.estimated) == (0, False)
    assert other.estimated
    assert abs(other.ns - AHEAD) <= other.error_ns < 10**9
    trace.scheduled(PLAN, now())
    ranks.events = 1
    (second,) = trace.take()
    assert second.offsets[1:] == (same, other)  # they never change, so that slices nest
    assert not second.tracks[0].asked_ns


def test_ranks_are_asked_only_after_work(at_once: None) -> None:
    ranks = Ranks()
    trace = EngineTrace(ranks, 0, 1000)
    trace.take()
    count = len(ranks.asked)
    assert trace.take() == []
    trace.scheduled(PLAN, now())
    trace.launched(PLAN, now())
    (events,) = trace.take()
    assert len(ranks.asked) == count + 1
    assert kinds(events) == [EventKind.SCHEDULE, EventKind.LAUNCH, EventKind.COLLECT]
    assert [kinds(events, track) for track in (1, 2)] == [[EventKind.STEP] * 3] * 2
    assert trace.take(ask=False) == []


def test_the_recording_ends_at_its_limit(at_once: None) -> None:
    ranks = Ranks(events=200)
    trace = EngineTrace(ranks, 0, 2000)
    while END not in ranks.asked:
        trace.scheduled(PLAN, now())
        trace.take()
    count = len(ranks.asked)
    trace.scheduled(PLAN, now())
    trace.take()
    assert len(ranks.asked) == count
    assert count < 10


def test_the_end_has_the_rest_and_what_has_happened() -> None:
    ranks = Ranks()
    trace = EngineTrace(ranks, 0, 1000)
    trace.take()
    ranks.replaced = True
    trace.note_replacement("rank 1 died")
    trace.scheduled(PLAN, now())
    end = trace.end()
    assert ranks.asked[-1] == END
    assert [text for _, text in end.notes] == ["rank 1 died"]
    assert (end.last, kinds(end)) == (True, [EventKind.SCHEDULE, EventKind.COLLECT])
    assert end.tracks[0].asked_ns


def test_ranks_that_were_replaced_record_as_soon_as_they_can_be_asked() -> None:
    """Not only after the usual period, in which they may compute many steps."""
    ranks = Ranks()
    trace = EngineTrace(ranks, 0, 1000)
    trace.take()
    count = len(ranks.asked)
    trace.note_replacement("rank 1 died")
    trace.take(ask=False)
    assert len(ranks.asked) == count
    (events,) = trace.take()
    assert len(ranks.asked) == count + 1
    assert kinds(events) == [EventKind.COLLECT]
    assert trace.take() == []


def test_an_engine_that_has_failed_asks_nothing() -> None:
    ranks = Ranks()
    trace = EngineTrace(ranks, 0, 1000)
    count = len(ranks.asked)
    assert trace.end(ask=False).last
    assert len(ranks.asked) == count
