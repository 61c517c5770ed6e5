"""A trace that is being recorded: what arrives is written to its file by a thread, up to a limit."""

import datetime
import json
import queue
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shoal.log import get_logger
from shoal.trace.chrome_events import ChromeEvents
from shoal.trace.clocks import now
from shoal.trace.request_slices import RequestSlices, RequestTimes
from shoal.trace.trace_file import TraceFile
from shoal.wire.trace import TraceEvents, TraceSummary

log = get_logger("trace")

_WRITE_S = 30.0  # how long the thread may take to write the rest at the end


class Recording:
    """A trace and its file. `add` and the methods of `requests` are called by one thread, and never block."""

    def __init__(self, path: Path, limit: int, model: str) -> None:
        """Begin the file.

        Args:
            limit: the most events to write. Those of a message are written together, so there may be some more.
            model: the name of the model.

        Raises:
            ConfigError: the file cannot be written.
        """
        self.limit = limit
        self.requests = RequestSlices(self._put)
        self._file = TraceFile(path)
        host = socket.gethostname()
        self._chrome = ChromeEvents(now(), host)
        self._facts: dict[str, Any] = {
            "producer": "shoal",
            "model": model,
            "began": datetime.datetime.now(datetime.UTC).isoformat(),
            "clock": f"ts counts microseconds of CLOCK_MONOTONIC of {host} from `began` on",
        }
        self._notes: list[str] = []
        self._stopped = False
        self._closed = False
        self._inbox: queue.SimpleQueue[TraceEvents | RequestTimes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="shoal-trace", daemon=True)
        self._thread.start()
        log.info("recording a trace to %s", path)

    @property
    def full(self) -> bool:
        """True if the limit is reached, or the file cannot be written any more: nothing is written from now on."""
        return self._stopped

    def add(self, recorded: Sequence[TraceEvents]) -> None:
        """Write what engines have recorded."""
        for events in recorded:
            self._put(events)

    def _put(self, found: TraceEvents | RequestTimes) -> None:
        if not self.full:
            self._inbox.put(found)

    def end(self, note: str = "") -> None:
        """Write the rest and close the file, without waiting for that: `summary` is there when it is done. Idempotent.

        Args:
            note: why the trace is not complete, if something has gone wrong.
        """
        if not self._closed:
            self._closed = True
            self.requests.end_all()
            if note:
                self._notes.append(note)
            self._inbox.put(None)

    @property
    def summary(self) -> TraceSummary | None:
        """The file of the trace and why it is not complete, if it is not; None while it is still written."""
        if self._thread.is_alive():
            return None
        return TraceSummary(str(self._file.path), self._file.events, "; ".join(self._notes))

    def close(self, note: str = "") -> TraceSummary:
        """Do the same as `end`, and wait until it is done."""
        self.end(note)
        self._thread.join(_WRITE_S)
        return self.summary or TraceSummary(str(self._file.path), self._file.events, "it is still being written")

    # --- on the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (found := self._inbox.get()) is not None:
                if self._stopped:
                    continue
                self._write(self._lines(found))
                if self._file.events >= self.limit:
                    self._stop(
                        f"the trace ends at the limit of {self.limit} events (--trace-events): it shows the beginning"
                    )
            self._write(())
        except OSError as error:
            self._stop(f"the trace ends because {self._file.path} cannot be written: {error.strerror}")
        finally:
            self._file.close()
        log.info("the trace %s has %d events: open it at https://ui.perfetto.dev", self._file.path, self._file.events)

    def _stop(self, why: str) -> None:
        """Write nothing more but the reason."""
        self._stopped = True
        self._notes.append(why)
        log.warning("%s", why)

    def _write(self, lines: Iterator[str] | Sequence[str]) -> None:
        facts = {**self._facts, "clocks": self._chrome.clocks}
        found = list(lines)
        dropped = [
            f"{track}: {count} events are missing, since there were too many in a second"
            for track, count in self._chrome.dropped.items()
        ]
        if notes := [*self._notes, *dropped]:
            facts["notes"] = notes
        self._file.append(found, facts)

    def _lines(self, found: TraceEvents | RequestTimes) -> Iterator[str]:
        if isinstance(found, TraceEvents):
            return self._chrome.of_engine(found)
        return self._request(found)

    def _request(self, times: RequestTimes) -> Iterator[str]:
        """Yield the slice of a request, and in it those of its parts."""
        args = {
            "replica": times.replica,
            "output": times.output,
            "prompt_tokens": times.prompt_tokens,
            "cached_tokens": times.cached_tokens,
            "output_tokens": times.tokens,
            "outcome": times.outcome,
        }
        of_request, lane = self._chrome.of_request, times.lane
        yield from of_request(lane, f"request {times.name}", times.arrival, times.ended, json.dumps(args))
        yield from of_request(lane, "queue", times.arrival, times.begun or times.ended)
        if times.first:
            yield from of_request(lane, "prompt", times.begun, times.first)
            yield from of_request(lane, "decode", times.first, times.ended)
