"""Events as JSON in the Chrome trace event format: a process for each replica, with a track for each of its ranks."""

import json
from array import array
from collections.abc import Iterator

from shoal.wire.trace import ROW, ClockOffset, EventKind, TraceEvents, TrackEvents

REQUESTS = 1  # the number of the process whose tracks are requests
_FIRST_REPLICA = 10  # the number of the process of replica 0


class ChromeEvents:
    """Makes JSON of events, whose times count from the beginning of the trace."""

    def __init__(self, origin: int, clock_host: str) -> None:
        """origin: the time at which the trace begins. clock_host: the host on whose clock this is."""
        self.clocks: dict[str, str] = {}  # track -> what is known of its clock
        self.dropped: dict[str, int] = {}  # track -> events that did not fit into the memory of its process
        self._origin = origin
        self._clock_host = clock_host
        self._named: set[tuple[int, int]] = set()  # tracks that have their names

    def of_engine(self, events: TraceEvents) -> Iterator[str]:
        """Yield the events of an engine and its ranks."""
        process = _FIRST_REPLICA + events.replica
        for track, offset in zip(events.tracks, events.offsets, strict=True):
            number = track.rank + 1
            if (process, number) not in self._named:
                yield from self._names(process, number, f"replica {events.replica}", track.title)
            self._note_facts(events, track, offset)
            yield from self._slices(events.replica, track, process, number, offset.ns + events.offset.ns)
        for at, text in events.notes:
            yield (
                f'{{"ph":"i","s":"p","name":{json.dumps(text)},"pid":{process},"tid":0,'
                f'"ts":{self._ts(at - events.offset.ns)}}}'
            )

    def _names(self, process: int, track: int, process_name: str, name: str) -> Iterator[str]:
        """Yield the events that name a track and, with its first track, a process."""
        if not any(known == process for known, _ in self._named):
            yield _meta("process_name", process, 0, name=process_name)
            yield _meta("process_sort_index", process, 0, sort_index=process)
        self._named.add((process, track))
        yield _meta("thread_name", process, track, name=name)
        yield _meta("thread_sort_index", process, track, sort_index=track)

    def _note_facts(self, events: TraceEvents, track: TrackEvents, offset: ClockOffset) -> None:
        where = f"replica {events.replica}, {track.title}"
        if track.dropped:
            self.dropped[where] = self.dropped.get(where, 0) + track.dropped
        if where not in self.clocks:
            place = f"process {track.pid} on {track.host}"
            if offset.estimated or events.offset.estimated:
                ahead, error = offset.ns + events.offset.ns, offset.error_ns + events.offset.error_ns
                self.clocks[where] = (
                    f"{place}; its clock was estimated from messages: {ahead / 1e3:.1f} us later than that of "
                    f"{self._clock_host}, with an error of at most {error / 1e3:.1f} us at the start and without drift"
                )
            else:
                self.clocks[where] = f"{place}; the same clock as that of {self._clock_host}"

    def _slices(self, replica: int, track: TrackEvents, process: int, number: int, offset: int) -> Iterator[str]:
        rows = array("q")
        rows.frombytes(track.rows)
        names = track.names
        rank = f'"pid":{process},"tid":{number}'
        shift = self._origin + offset
        for at in range(0, len(rows), ROW):
            kind, begun, duration, a, b, c = rows[at : at + ROW]
            match kind:
                case EventKind.STEP:
                    name, args = f"step {a}", f'"requests":{b},"tokens":{c}'
                case EventKind.DRAW:
                    name, args = f"step {a}: masked tokens", ""
                case EventKind.CALL:
                    name, args = names[a], ""
                case EventKind.LAYER:
                    name, args = f"{'draft ' if b else ''}layer {a}", ""
                case EventKind.OPERATION:
                    name, args = names[b], f'"axis":"{names[a]}","bytes":{c}'
                case EventKind.WAIT:
                    whom = f"rank {a}" if b == replica else f"rank {a} of replica {b}"
                    name, args = "wait" if a < 0 else f"wait for {whom}", ""
                case EventKind.SCHEDULE:
                    name, args = f"schedule {a}", f'"requests":{b},"tokens":{c}'
                case EventKind.LAUNCH:
                    name, args = f"launch {a}", ""
                case EventKind.APPLY:
                    name, args = f"apply {a}", f'"requests":{b}'
                case _:
                    name, args = "collect events", ""
            yield (
                f'{{"ph":"X","cat":"{EventKind(kind).name.lower()}","name":"{name}",{rank},'
                f'"ts":{(begun - shift) / 1e3:.3f},"dur":{duration / 1e3:.3f},"args":{{{args}}}}}'
            )

    def of_request(self, lane: int, name: str, begun: int, ended: int, args: str = "{}") -> Iterator[str]:
        """Yield a slice of a request. `lane`: the number of its track, which no other request has at that time."""
        if (REQUESTS, lane) not in self._named:
            yield from self._names(REQUESTS, lane, "requests", f"lane {lane}")
        begun = max(begun, self._origin)
        yield (
            f'{{"ph":"X","cat":"request","name":{json.dumps(name)},"pid":{REQUESTS},"tid":{lane},'
            f'"ts":{self._ts(begun)},"dur":{max(ended - begun, 0) / 1e3:.3f},"args":{args}}}'
        )

    def _ts(self, at: int) -> str:
        return f"{(at - self._origin) / 1e3:.3f}"


def _meta(kind: str, process: int, track: int, **args: object) -> str:
    return f'{{"ph":"M","name":"{kind}","pid":{process},"tid":{track},"args":{json.dumps(args)}}}'
