"""Messages about traces: the order to record one, and what an engine and its ranks have recorded.

Times are nanoseconds of `time.monotonic_ns()` on the host that measured them.
"""

from enum import IntEnum

import msgspec

from shoal.wire.base import Wire


class EventKind(IntEnum):
    """The kind of a slice of time. A row of `TrackEvents.rows` is kind, begin, duration, a, b and c."""

    STEP = 0  # of a rank: a: number of the step, b: requests, c: tokens
    DRAW = 1  # the second part of a step whose plan is masked: a: number of the step
    CALL = 2  # of a rank: a: name of the verb
    LAYER = 3  # a: number of the layer; b: 1 if it is one of the draft model
    OPERATION = 4  # between ranks: a: name of the axis, b: name of the operation, c: bytes for other ranks
    WAIT = 5  # the part of an operation that was a wait: a: the rank that came last, b: its replica; -1: not known
    SCHEDULE = 6  # of an engine: a: number of the step, b: requests, c: tokens
    LAUNCH = 7  # a step is sent to the ranks: a: number of the step
    APPLY = 8  # the results of a step are taken in: a: number of the step, b: requests that drew tokens
    COLLECT = 9  # the engine asks its ranks for their events


TRACE = "trace"  # the verb of a RankCall: record from now on, and return what was recorded so far
END = b"end"  # its payload if the recording ends by that

ROW = 6  # numbers in a row: int64, native byte order


class TrackEvents(Wire, frozen=True):
    """The events that a rank or an engine has recorded since it was asked the last time."""

    rank: int  # -1: the engine
    title: str  # of the track: "engine", "rank 1 (tp 1, pp 0)"
    host: str
    pid: int
    clock: str  # processes with the same text have the same clock
    asked_ns: int  # when it was asked; 0: it was not, and tells by itself
    answered_ns: int
    rows: bytes
    names: tuple[str, ...]  # a name in a row is a place in this list
    dropped: int = 0  # events that did not fit into its memory


class ClockOffset(Wire, frozen=True):
    """The time that must be subtracted from the times of one process to get those of another."""

    ns: int = 0
    error_ns: int = 0  # the true offset differs by at most this
    estimated: bool = False  # False: both have the same clock


SAME_CLOCK = ClockOffset()


class TraceEvents(Wire, frozen=True):
    """The events that an engine and its ranks have recorded since the last message of this kind."""

    replica: int
    tracks: tuple[TrackEvents, ...]  # the first is the engine's
    offsets: tuple[ClockOffset, ...]  # from the clock of each track to that of the engine
    notes: tuple[tuple[int, str], ...] = ()  # what has happened besides, and when: ranks that died, ...
    last: bool = False  # True: the recording has ended
    offset: ClockOffset = SAME_CLOCK  # from the clock of the engine to that of the reader, who sets it


class SetTracing(Wire, frozen=True):
    """An order to an engine to record a trace from now on, or to end it. `TraceEvents` answer both orders."""

    limit: int  # the most events to record; 0: end


class TraceSummary(Wire, frozen=True):
    """The file of a trace that has ended, and why it is not complete, if it is not."""

    file: str
    events: int
    note: str = ""  # why it is not complete; "": it is


track_events_decoder: msgspec.msgpack.Decoder[TrackEvents] = msgspec.msgpack.Decoder(TrackEvents)

trace_summary_decoder: msgspec.msgpack.Decoder[TraceSummary] = msgspec.msgpack.Decoder(TraceSummary)
