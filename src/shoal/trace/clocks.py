"""The clocks of processes: which are the same, and how far others are apart.

Processes of one host have one clock, CLOCK_MONOTONIC. For two hosts each message between them is a bound, since it
arrives after it was sent: a question says how much later the other clock is at most, and an answer how much at least
(as in NTP; Mills, 1991). The offset is taken from the middle between the bounds, and half their distance is its error.
"""

import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from shoal.wire.trace import ClockOffset

now = time.monotonic_ns


@cache
def clock_identity() -> str:
    """Return a text that is equal for the processes whose monotonic clocks are the same."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/time").st_ino))  # such a namespace has clocks of its own
    return ":".join(parts)


class ClockBounds:
    """The bounds of how much later another clock is than the clock here, from messages in both directions."""

    def __init__(self) -> None:
        self._least: int | None = None
        self._most: int | None = None

    def asked(self, sent_here: int, received_there: int) -> None:
        """Note a message to the other process."""
        bound = received_there - sent_here
        self._most = bound if self._most is None else min(self._most, bound)

    def answered(self, sent_there: int, received_here: int) -> None:
        """Note a message from the other process."""
        bound = sent_there - received_here
        self._least = bound if self._least is None else max(self._least, bound)

    @property
    def offset(self) -> ClockOffset:
        """The estimate; without messages in both directions an offset of 0 is assumed, whose error is not known."""
        if self._least is None or self._most is None:
            return ClockOffset(estimated=True)
        least, most = min(self._least, self._most), max(self._least, self._most)  # one of the clocks may drift
        return ClockOffset((least + most) // 2, (most - least + 1) // 2, estimated=True)
