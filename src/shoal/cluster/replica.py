"""An engine in a process of its own, as an EngineClient."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from shoal import wire
from shoal.errors import ClosedError, EngineError, UserError
from shoal.transport.channel import ChannelClosed, wait
from shoal.transport.process import ChildProcess, end_all

_SLICE_S = 0.5
_QUIET_S = 3.0  # without a word for so long while one is awaited, the process is looked at: was it stopped?
_END_S = 1.5


class EngineProcess:
    """Starts `python -m shoal.frontend.engine_process`, which ends when this process does."""

    def __init__(
        self, model: str | None, options: Mapping[str, Any], *, start_timeout: float, answer_timeout: float
    ) -> None:
        """Waits until the engine is ready. It answers between steps, within `answer_timeout` seconds.

        Raises:
            UserError: the engine was asked for something that can't work.
            EngineError: it failed, or was not ready in time.
        """
        self._updates: list[wire.SeqUpdate] = []
        self._stats: list[wire.EngineStats] = []
        self._failure: EngineError | None = None
        self._closed = False
        self._heard = time.monotonic()
        self._answer_timeout = answer_timeout
        self._child = ChildProcess("shoal.frontend.engine_process")
        try:
            self._send(wire.EngineSetup(model, dict(options)))
            self._await_stats("start", start_timeout)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    def add(self, request: wire.EngineRequest) -> None:
        self._send(request)

    def abort(self, seqs: Sequence[int]) -> None:
        if seqs and not self._closed and self._failure is None:
            self._send(wire.Abort(tuple(seqs)))

    def updates(self, timeout: float) -> list[wire.SeqUpdate]:
        self._check_open()
        if not self._updates:
            self._receive(timeout)
        updates, self._updates = self._updates, []
        return updates

    def stats(self) -> wire.EngineStats:
        self._send(wire.StatsQuery())
        return self._await_stats("stats", self._answer_timeout)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            end_all([self._child], None if self._failure else wire.encode(wire.Stop()), _END_S)

    def _await_stats(self, what: str, timeout: float) -> wire.EngineStats:
        begun = time.monotonic()
        while not self._stats:
            self._receive(_SLICE_S)
            if time.monotonic() - begun > timeout:
                self._fail(f"engine process {self.pid} did not answer {what} within {timeout:g} s")
        return self._stats.pop()

    def _receive(self, timeout: float) -> None:
        """Sorts what arrives within `timeout` seconds."""
        if not wait([self._child.channel], timeout):
            if time.monotonic() - self._heard > _QUIET_S and self._child.stopped():
                self._fail(f"engine process {self.pid} is stopped (SIGSTOP or a debugger)")
            return
        self._heard = time.monotonic()
        try:
            frames = self._child.channel.receive()
        except ChannelClosed:
            self._fail(f"engine process {self.pid} {self._child.death()}")
        for frame in frames:
            match wire.from_engine.decode(frame):
                case wire.Updates() as message:
                    self._updates += message.updates
                case wire.EngineStats() as stats:
                    self._stats.append(stats)
                case wire.EngineFailure() as failure:
                    self._fail(failure.error, user_error=failure.user_error)

    def _send(self, message: wire.ToEngine) -> None:
        self._check_open()
        try:
            self._child.channel.send(wire.encode(message))
        except ChannelClosed:
            self._receive(0)  # its last words, if it had any
            self._fail(f"engine process {self.pid} {self._child.death()}")

    def _fail(self, message: str, *, user_error: bool = False) -> NoReturn:
        self._failure = EngineError(message)
        self._child.kill()
        raise UserError(message) if user_error else self._failure

    def _check_open(self) -> None:
        if self._failure is not None:
            raise ClosedError(f"the engine has failed: {self._failure}")
        if self._closed:
            raise ClosedError("the engine was closed")
