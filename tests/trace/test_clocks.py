"""The estimate of the offset between the clocks of two hosts."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.trace.clocks import ClockBounds, clock_identity
from shoal.trace.trace_inbox import TraceInbox
from shoal.wire.trace import SAME_CLOCK, ClockOffset, TraceEvents, TrackEvents
from support.fakes import steady

DELAYS = st.integers(0, 10**8)


@given(st.integers(-(10**15), 10**15), st.lists(st.tuples(DELAYS, DELAYS), min_size=1))
@steady
def test_the_true_offset_is_within_the_error(offset: int, delays: list[tuple[int, int]]) -> None:
    bounds, here = ClockBounds(), 0
    for there, back in delays:
        bounds.asked(here, here + there + offset)
        here += there + 1000  # what the other process takes to answer
        bounds.answered(here + offset, here + back)
        here += back
    found = bounds.offset
    assert abs(found.ns - offset) <= found.error_ns <= (min(there + back for there, back in delays) + 1) // 2 + 1
    assert found.estimated


def test_without_an_answer_the_offset_is_not_known() -> None:
    bounds = ClockBounds()
    bounds.asked(5, 7)
    assert bounds.offset == ClockOffset(0, 0, estimated=True)


def track(clock: str, asked: int, answered: int) -> TrackEvents:
    return TrackEvents(-1, "engine", "host", 1, clock, asked, answered, b"", ())


def test_an_engine_on_another_host_is_measured_by_its_first_message() -> None:
    inbox = TraceInbox(TraceInbox())
    ahead = 10**12
    begun = inbox.asked + ahead
    inbox.add(TraceEvents(0, (track("another", begun + 1000, begun + 2000),), (SAME_CLOCK,)))
    inbox.add(TraceEvents(0, (track("another", 0, begun + 9000),), (SAME_CLOCK,), last=True))
    first, second = inbox.take()
    assert first.offset.estimated
    assert abs(first.offset.ns - ahead) <= first.offset.error_ns
    assert second.offset == first.offset  # it never changes, so that slices nest
    assert not inbox.recording
    inbox.add(TraceEvents(0, (track(clock_identity(), 1, 2),), (SAME_CLOCK,)))
    same = TraceInbox(TraceInbox())
    same.add(TraceEvents(0, (track(clock_identity(), 1, 2),), (SAME_CLOCK,)))
    assert same.take()[0].offset == SAME_CLOCK


def test_the_rest_of_an_earlier_trace_is_dropped() -> None:
    earlier = TraceInbox(TraceInbox())
    inbox = TraceInbox(earlier)  # a new trace begins, although the end of the earlier one has not come
    own = track(clock_identity(), 1, 2)
    for replica, last in ((0, False), (1, True), (2, False), (3, True)):
        assert inbox.recording
        inbox.add(TraceEvents(replica, (own,), (SAME_CLOCK,), last=last))
    assert [events.replica for events in inbox.take()] == [2, 3]
    assert not inbox.recording
