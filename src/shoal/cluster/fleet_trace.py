"""The trace of a fleet: one at a time, recorded from all replicas and from the requests of all clients."""

import time
from collections.abc import Callable
from contextlib import suppress

from shoal.cluster.fleet import Fleet
from shoal.errors import ConfigError, ShoalError
from shoal.log import get_logger
from shoal.trace.recording import Recording
from shoal.trace.target import TraceTarget
from shoal.wire.base import encode

log = get_logger("trace")

END_S = 30.0  # how long replicas may take to send the rest of their events: they answer between two steps
_LAST_S = 3.0  # ... before the fleet is closed
_WRITE_S = 3.0  # ... and how long the writing of it may take after that
_SLICE_S = 0.02

Done = Callable[[bytes | ShoalError], object]
"""A function that is called once, with a `TraceSummary` or with an error."""


class FleetTrace:
    """Starts and ends traces of a fleet, on the thread that drives it."""

    def __init__(self, fleet: Fleet, target: TraceTarget, limit: int, model: str) -> None:
        """Begin a trace, if the target is a file.

        Raises:
            ConfigError: the file cannot be written.
        """
        self._fleet = fleet
        self._target = target
        self._limit = limit
        self._model = model
        self._count = 0  # traces so far
        self._recording: Recording | None = None
        self._told_end = False  # True: the replicas were told to end it
        self._waiting: list[Done] = []  # those who wait for its end
        self._deadline = 0.0
        if target.file is not None:
            self.start()

    def start(self) -> None:
        """Begin a trace.

        Raises:
            ConfigError: one is recorded already, or the file cannot be written.
        """
        if self._recording is not None:
            raise ConfigError("a trace is recorded already: end it first (POST /stop_profile)")
        self._recording = Recording(self._target.path(self._count), self._limit, self._model)
        self._count += 1
        self._told_end = False
        self._fleet.recorders.append(self._recording.requests)
        self._fleet.traces.begin(self._limit)

    def stop(self, done: Done) -> None:
        """End the trace. `done` is called, from within `tick`, when it is written."""
        if self._recording is None:
            done(ConfigError("no trace is recorded: begin one first (POST /start_profile)"))
            return
        self._waiting.append(done)
        if len(self._waiting) == 1:
            self._deadline = time.monotonic() + END_S
            self._tell_end()

    def _tell_end(self) -> None:
        if not self._told_end:
            self._told_end = True
            self._fleet.traces.end()

    def tick(self) -> None:
        """Take what the replicas have sent, and end the trace if that is due."""
        recording = self._recording
        if recording is None:
            return
        recording.add(self._fleet.traces.take())
        if recording.full:
            self._tell_end()
        if not self._waiting:
            return
        if self._fleet.traces.has_ended:
            recording.end()
        elif time.monotonic() > self._deadline:
            recording.end("a replica has not sent the rest of its events")
        if (summary := recording.summary) is not None:
            self._recording = None
            self._fleet.recorders.remove(recording.requests)
            waiting, self._waiting = self._waiting, []
            for done in waiting:
                done(encode(summary))

    @property
    def is_ending(self) -> bool:
        """True if `tick` waits for the end of the trace."""
        return bool(self._waiting)

    def close(self) -> None:
        """End the trace, if there is one, before the fleet is closed. Replicas have some seconds."""
        if self._recording is None:
            return
        self.stop(lambda _: None)
        self._deadline = min(self._deadline, time.monotonic() + _LAST_S)
        give_up = self._deadline + _WRITE_S
        while self._recording is not None and time.monotonic() < give_up:
            with suppress(ShoalError):
                self._fleet.updates(_SLICE_S)
            self.tick()
