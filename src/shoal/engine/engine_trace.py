"""What an engine and its ranks do, as events of a trace."""

import os
import socket
from collections.abc import Callable, Sequence

from shoal.trace.clocks import ClockBounds, clock_identity, now
from shoal.trace.event_buffer import EventBuffer
from shoal.wire.ranks import StepPlan, StepResult
from shoal.wire.trace import (
    END,
    ROW,
    SAME_CLOCK,
    TRACE,
    ClockOffset,
    EventKind,
    TraceEvents,
    TrackEvents,
    track_events_decoder,
)

PERIOD_NS = 1_000_000_000  # how often ranks are asked for their events: each time they wait for the next step
_FIRST_QUESTIONS = 4  # at the start, for the clocks of other hosts: a rank without a step to finish answers at once
_ROW_BYTES = 8 * ROW

AskRanks = Callable[[str, bytes], Sequence[bytes]]
"""A function that has all ranks do a verb, and returns their answers; none while ranks are being replaced."""


class EngineTrace:
    """Records what an engine does, and collects what its ranks record."""

    def __init__(self, ask_ranks: AskRanks, replica: int, limit: int) -> None:
        """Have the ranks record from now on.

        Args:
            replica: the number of the engine among the replicas.
            limit: the most events to record.
        """
        self._ask_ranks = ask_ranks
        self._replica = replica
        self._asked = now()
        self._left = limit
        self._buffer = EventBuffer()
        self._notes: list[tuple[int, str]] = []
        self._clocks: dict[tuple[int, int], ClockBounds] = {}  # of ranks on other hosts, by rank and process
        self._offsets: dict[tuple[int, int], ClockOffset] = {}  # those that are in use: they never change
        self._collected: list[TrackEvents] = []
        self._next = now() + PERIOD_NS
        self._worked = False  # True: a step was launched since ranks were asked last
        self._has_new_ranks = False  # True: some ranks were not asked yet, so that they do not record
        self._answers_start = True  # the first message also answers the order to begin
        for _ in range(_FIRST_QUESTIONS):
            self._collect()
            if not self._clocks:  # all ranks are on this host
                break

    # --- what the engine does --------------------------------------------------------------------------------------

    def scheduled(self, plan: StepPlan, begun: int) -> None:
        self._worked = True
        tokens = sum(work.count for work in plan.work)
        self._buffer.add(EventKind.SCHEDULE, begun, now(), plan.step, len(plan.work), tokens)

    def launched(self, plan: StepPlan, begun: int) -> None:
        self._buffer.add(EventKind.LAUNCH, begun, now(), plan.step)

    def applied(self, result: StepResult, begun: int) -> None:
        self._buffer.add(EventKind.APPLY, begun, now(), result.step, len(result.out))

    def note_replacement(self, why: str) -> None:
        """Note that ranks are replaced from now on. The new ones record from the next time that ranks are asked."""
        self._notes.append((now(), why))
        self._has_new_ranks = True

    # --- what has been recorded ------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Return whether it is time to ask the ranks again."""
        return self._has_new_ranks or (self._worked and now() >= self._next)

    def take(self, *, ask: bool = True) -> list[TraceEvents]:
        """Return what was recorded since the last call. The ranks are asked for it if that `is_due` and `ask` is set.

        Args:
            ask: False if the ranks cannot be asked now.

        Raises:
            EngineError: a rank has failed.
        """
        due = ask and self._left > 0 and self.is_due
        if due:
            self._collect()
            if self._left <= 0:
                self._end_ranks()
        return [self._message()] if due or self._answers_start or self._notes else []

    def end(self, *, ask: bool = True) -> TraceEvents:
        """End the recording, and return the rest of it.

        Args:
            ask: False if the ranks cannot be asked any more.

        Raises:
            EngineError: a rank has failed.
        """
        self._asked = now()
        if ask:
            self._end_ranks()
        return self._message(last=True)

    def _end_ranks(self) -> None:
        self._collect(END)

    def _collect(self, payload: bytes = b"") -> None:
        asked = now()
        answers = [track_events_decoder.decode(answer) for answer in self._ask_ranks(TRACE, payload)]
        answered = now()
        self._buffer.add(EventKind.COLLECT, asked, answered)
        for track in answers:
            if track.clock != clock_identity():
                bounds = self._clocks.setdefault((track.rank, track.pid), ClockBounds())
                bounds.asked(asked, track.asked_ns)
                bounds.answered(track.answered_ns, answered)
            self._left -= len(track.rows) // _ROW_BYTES
        self._collected += [track for track in answers if track.rows or track.dropped or self._answers_start]
        self._worked = False
        self._has_new_ranks = self._has_new_ranks and not answers
        self._next = answered + PERIOD_NS

    def _offset(self, track: TrackEvents) -> ClockOffset:
        bounds = self._clocks.get((track.rank, track.pid))
        if bounds is None:
            return SAME_CLOCK
        return self._offsets.setdefault((track.rank, track.pid), bounds.offset)

    def _message(self, *, last: bool = False) -> TraceEvents:
        rows, names, dropped = self._buffer.take()
        self._left -= len(rows) // _ROW_BYTES
        asked, self._asked = self._asked, 0
        own = TrackEvents(
            -1, "engine", socket.gethostname(), os.getpid(), clock_identity(), asked, now(), rows, names, dropped
        )
        tracks, self._collected = self._collected, []
        notes, self._notes = self._notes, []
        self._answers_start = False
        return TraceEvents(
            self._replica,
            (own, *tracks),
            (SAME_CLOCK, *map(self._offset, tracks)),
            tuple(notes),
            last,
        )
