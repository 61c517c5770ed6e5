"""Ctrl-C and SIGTERM, held back while something must not be interrupted."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from shoal.errors import ShoalError

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(ShoalError):
    """A command was interrupted by Ctrl-C or SIGTERM."""

    exit_code = 130


class SignalHolder:
    """A context in which either signal raises KeyboardInterrupt, but never inside `held`: there it waits until the end.

    After one interrupt further ones are ignored, since closing what is open takes a moment. It is for the main thread.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._holding = False
        self._pending = False

    def __enter__(self) -> "SignalHolder":
        self._before = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if interrupted else handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._pending:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._pending = True
        if not self._holding:
            raise KeyboardInterrupt
