"""A signal to end as something that a loop over channels can wait for."""

import os
import signal
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SignalEvent:
    """A context in which a signal to end makes this readable, so that `wait` can include it."""

    backlog = False

    def __init__(self) -> None:
        self.arrived = False
        self._former_handlers: dict[int, Any] = {}

    def __enter__(self) -> "SignalEvent":
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for number in _SIGNALS:
            self._former_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former_handlers.items():
            signal.signal(number, former)
        os.close(self._fd)

    def _note(self, number: int, frame: object) -> None:
        self.arrived = True
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd
