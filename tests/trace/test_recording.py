"""The file of a trace: its events, its limit, and what it says of clocks and missing events."""

from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.trace import clocks
from shoal.trace.event_buffer import EventBuffer
from shoal.trace.recording import Recording
from shoal.trace.request_slices import RequestSlices, RequestTimes
from shoal.trace.target import TraceTarget
from shoal.trace.trace_file import TraceFile
from shoal.wire.base import replace_fields
from shoal.wire.engine import Finish, SeqUpdate
from shoal.wire.trace import SAME_CLOCK, ClockOffset, EventKind, TraceEvents, TrackEvents
from support.fakes import request
from support.traces import Trace

MS = 1_000_000


def of_rank(buffer: EventBuffer, clock: str = "here") -> TrackEvents:
    rows, names, dropped = buffer.take()
    return TrackEvents(0, "rank 0 (tp 0, pp 0)", "there", 7, clock, 1, 2, rows, names, dropped)


def of_engine(*ranks: TrackEvents, offset: ClockOffset = SAME_CLOCK, note: str = "") -> TraceEvents:
    engine = TrackEvents(-1, "engine", "here", 6, "here", 1, 2, b"", ())
    notes = ((clocks.now(), note),) if note else ()
    return TraceEvents(2, (engine, *ranks), (SAME_CLOCK, *[offset] * len(ranks)), notes)


def a_step(begun: int, capacity: int = 100) -> EventBuffer:
    buffer = EventBuffer(capacity)
    buffer.add(EventKind.STEP, begun, begun + 9 * MS, 5, 2, 30)
    buffer.add(EventKind.LAYER, begun + MS, begun + 4 * MS, 3)
    buffer.add(EventKind.OPERATION, begun + 2 * MS, begun + 3 * MS, buffer.name("tp"), buffer.name("all_reduce"), 64)
    buffer.add(EventKind.WAIT, begun + 2 * MS, begun + 2 * MS + 1, 1, 0)
    return buffer


@pytest.mark.parametrize("name", ["run.json", "run.json.gz"])
def test_the_file_is_valid_after_each_part(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    file = TraceFile(path)
    assert Trace(path).events == []
    event = '{"ph":"i","name":"a","pid":1,"tid":1,"ts":1}'
    for count in range(1, 4):
        file.append([event] * count, {"count": count, "long": "x" * (200 // count)})  # the end becomes shorter
        found = Trace(path)
        assert (len(found.events), found.facts["count"]) == (count * (count + 1) // 2, count)
    file.close()
    TraceFile(path).close()  # a trace may be replaced
    assert Trace(path).events == []


def test_another_clock_is_shifted_and_explained(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "run.json", 100, "model")
    ahead = 10**12
    begun = clocks.now()
    estimate = ClockOffset(ahead, 2500, estimated=True)
    recording.add([of_engine(of_rank(a_step(begun + ahead), "there"), offset=estimate, note='rank 1 has "died"')])
    summary = recording.close()
    trace = Trace(tmp_path / "run.json")
    step, layer, operation, wait = trace.slices
    assert (step.track, step.name, step.args) == (
        "replica 2, rank 0 (tp 0, pp 0)",
        "step 5",
        {"requests": 2, "tokens": 30},
    )
    assert 0 <= step.begin < 60e6  # and not a thousand seconds later
    assert (step.duration, layer.name, round(layer.begin - step.begin)) == (9000.0, "layer 3", 1000)
    assert (operation.name, operation.args) == ("all_reduce", {"axis": "tp", "bytes": 64})
    assert wait.name == "wait for rank 1 of replica 0"
    said = trace.facts["clocks"]["replica 2, rank 0 (tp 0, pp 0)"]
    assert "process 7 on there; its clock was estimated from messages: 1000000000.0 us later" in said
    assert "an error of at most 2.5 us" in said
    assert [each["name"] for each in trace.events if each["ph"] == "i"] == ['rank 1 has "died"']
    assert (summary.events, summary.note) == (len(trace.events), "")


def test_events_beyond_the_memory_of_a_rank_are_counted(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "run.json", 100, "model")
    recording.add([of_engine(of_rank(a_step(clocks.now(), capacity=3)))])
    note = "replica 2, rank 0 (tp 0, pp 0): 1 events are missing, since there were too many in a second"
    assert recording.close().events == 3 + 6
    assert Trace(tmp_path / "run.json").facts["notes"] == [note]


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(tmp_path / "run.json", 100, "model")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shoal.trace.trace_file.TraceFile.append", fail)
    recording.add([of_engine(of_rank(a_step(clocks.now())))])
    summary = recording.close()
    assert recording.full
    assert summary.note == f"the trace ends because {tmp_path}/run.json cannot be written: No space left on device"
    assert Trace(tmp_path / "run.json").events == []


def test_requests_share_a_lane_only_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[RequestTimes] = []
    slices = RequestSlices(done.append)
    clock = iter(range(1000, 10**6, 1000))
    monkeypatch.setattr("shoal.trace.request_slices.now", lambda: next(clock))
    for seq, arrival in ((0, 1e-6), (1, 1.5e-6)):
        slices.added(replace_fields(request(seq, [1, 2]), arrival=arrival, name=f"name {seq}"))
    slices.dispatched(0, 3)
    slices.updated(3, SeqUpdate(0, (4,), waited_us=1, cached_tokens=1))
    slices.updated(3, SeqUpdate(0, (4,), finish=Finish.STOP))  # at 3 us
    slices.added(replace_fields(request(2, [1]), arrival=2e-6))  # arrived before lane 0 was free
    slices.added(replace_fields(request(3, [1]), arrival=4e-6))
    slices.updated(0, SeqUpdate(9, (4,)))  # arrived before the trace began
    slices.stopped(1)
    slices.ended(SeqUpdate(1, (), finish=Finish.ABORT))
    slices.end_all()
    assert [(each.name, each.lane, each.outcome) for each in done] == [
        ("name 0", 0, "stop"),
        ("name 1", 1, "stop"),
        ("2", 2, "has not ended"),
        ("3", 0, "has not ended"),
    ]
    first = done[0]
    assert (first.arrival, first.dispatched, first.begun, first.first, first.ended) == (1000, 1000, 2000, 2000, 3000)
    assert (first.replica, first.tokens, first.cached_tokens) == (3, 2, 1)


def test_names_of_files(tmp_path: Path) -> None:
    file = TraceTarget.of(str(tmp_path / "a.b.json.gz"))
    assert [file.path(count).name for count in range(3)] == ["a.b.json.gz", "a-1.b.json.gz", "a-2.b.json.gz"]
    assert TraceTarget.of("run.json", replica=1).path(0) == Path("run-replica-1.json")
    folder = TraceTarget.of(str(tmp_path))
    assert folder.file is None
    assert folder.path(0).parent == tmp_path
    assert folder.path(0) != folder.path(0)
    folder.check()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="cannot be written"):
        TraceTarget.of(str(tmp_path / "missing" / "run.json")).check()
