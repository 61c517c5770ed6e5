"""The traces of an `LLM`: one at a time, each in a file of its own."""

from shoal.errors import ConfigError
from shoal.llm.shared_engine import SharedEngine
from shoal.llm.traced_engine import TracedEngine
from shoal.trace.recording import Recording
from shoal.trace.target import TraceTarget


class Tracing:
    """Begins and ends traces. While one is recorded, the shared engine is a `TracedEngine`."""

    def __init__(self, shared: SharedEngine, target: TraceTarget, limit: int, model: str) -> None:
        """`limit`: the most events of a trace. `model`: its name."""
        self._shared = shared
        self._target = target
        self._limit = limit
        self._model = model
        self._count = 0  # traces so far

    def begin_if_file(self) -> None:
        """Begin a trace if the target is a file, and no folder.

        Raises:
            ConfigError: the file cannot be written.
            EngineError: the engine has failed.
        """
        if self._target.file is not None:
            self.start()

    def start(self) -> None:
        """Begin a trace.

        Raises:
            ConfigError: one is recorded already, or its file cannot be written.
            EngineError: the engine has failed.
        """
        with self._shared.turn() as engine:
            if isinstance(engine, TracedEngine):
                raise ConfigError("a trace is recorded already: end it first with stop_profile")
            recording = Recording(self._target.path(self._count), self._limit, self._model)
            self._count += 1
            try:
                self._shared.client = TracedEngine(engine, recording)
            except BaseException:
                recording.close("the engine has failed")
                raise

    def stop(self) -> None:
        """End the trace and close its file.

        Raises:
            ConfigError: no trace is recorded.
        """
        with self._shared.turn() as engine:
            if not isinstance(engine, TracedEngine):
                raise ConfigError("no trace is recorded: begin one first with start_profile")
            self._shared.client = engine.engine
            engine.end_recording()
