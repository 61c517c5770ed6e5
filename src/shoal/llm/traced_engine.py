"""An engine of an `LLM` whose trace is recorded. It takes the place of the engine while that lasts."""

from collections.abc import Sequence

from shoal.activity import Activity
from shoal.cluster.replica_set import ReplicaSet
from shoal.errors import EngineError
from shoal.log import get_logger
from shoal.protocols import Engine
from shoal.trace.recording import Recording
from shoal.wire.engine import EngineRequest, EngineStats, ResetOutcome, SeqUpdate
from shoal.wire.trace import TraceEvents, TraceSummary

log = get_logger("trace")


class TracedEngine:
    """An `Engine` that records what the engine behind it does, and the requests of its client."""

    def __init__(self, engine: Engine, recording: Recording) -> None:
        """Begin to record.

        Raises:
            EngineError: the engine has failed.
        """
        self.engine = engine
        self._recording = recording
        self._requests = recording.requests
        self._knows_requests = isinstance(engine, ReplicaSet)  # then it tells of them itself, with their replicas
        if isinstance(engine, ReplicaSet):
            engine.recorders.append(self._requests)
        self._ended = False
        self._busy = False  # True: a thread waits for updates
        engine.begin_trace(recording.limit)
        self._collect()

    def end_recording(self) -> TraceSummary:
        """End the trace and close its file. The engine goes on."""
        note = ""
        try:
            self._end_engine()
        except EngineError as error:
            note = f"the trace ends with the engine: {error}"
        if isinstance(self.engine, ReplicaSet):
            self.engine.recorders.remove(self._requests)
        return self._recording.close(note)

    def _end_engine(self) -> None:
        if not self._ended:
            self._ended = True
            self._recording.add(self.engine.end_trace())

    def _collect(self) -> None:
        self._recording.add(self.engine.take_trace())
        if self._recording.full:
            self._end_engine()

    def add(self, request: EngineRequest) -> None:
        if not self._knows_requests:
            self._requests.added(request)
        self.engine.add(request)

    def abort(self, seqs: Sequence[int]) -> None:
        self.engine.abort(seqs)

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._busy = True
        try:
            found = self.engine.updates(timeout)
        except EngineError as error:
            self._recording.add(self._rest())
            self._recording.close(f"the trace ends with the engine: {error}")
            raise
        finally:
            self._busy = False
        if not self._knows_requests:
            for update in found:
                self._requests.updated(0, update)
        self._collect()
        return found

    def _rest(self) -> list[TraceEvents]:
        """Return what an engine that has failed had recorded."""
        self._ended = True
        try:
            return self.engine.take_trace()
        except EngineError:
            return []

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def set_activity(self, activity: Activity) -> None:
        self.engine.set_activity(activity)

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        return self.engine.reset_prefix_cache(running=running)

    def begin_trace(self, limit: int) -> None:
        """Refuse the call: a trace is recorded already.

        Raises:
            EngineError: always.
        """
        raise EngineError("a trace is recorded already")

    def take_trace(self) -> list[TraceEvents]:
        return []  # the recording takes all of it

    def end_trace(self) -> list[TraceEvents]:
        return []

    def close(self) -> None:
        """Close the engine under a thread that may use it. Then the trace has what the engine gave last."""
        if self._busy:
            self._recording.close("the engine was closed in the middle of a step")
        else:
            self.end_recording()
        self.engine.close()
