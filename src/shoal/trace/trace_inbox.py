"""What an engine in another process has recorded, as it arrives."""

from shoal.trace.clocks import ClockBounds, clock_identity, now
from shoal.wire.base import replace_fields
from shoal.wire.trace import SAME_CLOCK, ClockOffset, TraceEvents


class TraceInbox:
    """The messages with the trace of an engine that were not taken yet. One is made for each recording.

    The first message shows how far the clock of the engine is from the clock here.
    """

    def __init__(self, before: "TraceInbox | None" = None) -> None:
        """Note that the engine is told to record now, if there was an inbox `before`, perhaps that of another trace."""
        self.recording = before is not None  # False: nothing is recorded, or the last message has arrived
        self._stale: int = 0 if before is None else before._stale + before.recording  # traces whose rest still comes
        self.asked = now()
        self._offset: ClockOffset | None = None
        self._messages: list[TraceEvents] = []

    def add(self, events: TraceEvents) -> None:
        if self._stale:
            self._stale -= events.last
            return
        if self._offset is None:
            self._offset = self._measure(events)
        self._messages.append(replace_fields(events, offset=self._offset))
        if events.last:
            self.recording = False

    def _measure(self, events: TraceEvents) -> ClockOffset:
        engine = events.tracks[0]
        if engine.clock == clock_identity():
            return SAME_CLOCK
        bounds = ClockBounds()
        bounds.asked(self.asked, engine.asked_ns)
        bounds.answered(engine.answered_ns, now())
        return bounds.offset

    def take(self) -> list[TraceEvents]:
        messages, self._messages = self._messages, []
        return messages
