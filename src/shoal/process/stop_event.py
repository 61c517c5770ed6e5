"""An event that a loop over channels can wait for, to end a program or a part of it."""

import os
import signal
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopEvent:
    """An event that another thread sets once. It is readable from then on, so that `wait` can include it."""

    backlog = False

    def __init__(self) -> None:
        self.arrived = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def set(self) -> None:
        self.arrived = True
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd

    def __enter__(self) -> "StopEvent":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class SignalEvent(StopEvent):
    """A context in which a signal to end sets the event."""

    def __init__(self) -> None:
        super().__init__()
        self._former_handlers: dict[int, Any] = {}

    def __enter__(self) -> "SignalEvent":
        for number in _SIGNALS:
            self._former_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former_handlers.items():
            signal.signal(number, former)
        super().__exit__()

    def _note(self, number: int, frame: object) -> None:
        self.set()
