"""The progress of a run on stderr: one changing line on a terminal, else a new line from time to time."""

import sys
from typing import TextIO

from shoal.client.load.outcome import LoadOutcome

_PERIOD_S = {True: 0.5, False: 10.0}


class RunProgress:
    """Shows the progress of a run of `total` requests; None: their number is not known."""

    def __init__(self, total: int | None, *, stream: TextIO | None = None) -> None:
        self._total = total
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._done = self._failed = self._tokens = 0
        self._width = 0
        self.period = _PERIOD_S[self._terminal]

    def add(self, outcome: LoadOutcome) -> None:
        self._done += 1
        self._failed += not outcome.ok
        self._tokens += outcome.output_tokens

    def show(self, seconds: float, running: int) -> None:
        """Show the progress after `seconds` of the run."""
        of = "" if self._total is None else f"/{self._total}"
        failed = f", {self._failed} failed" if self._failed else ""
        rate = self._tokens / max(seconds, 1e-3)
        line = f"{self._done}{of} requests, {running} running{failed}, {rate:,.0f} tokens/s out, {seconds:.0f} s"
        if self._terminal:
            print(f"\r{line:<{self._width}}", end="", file=self._stream, flush=True)
            self._width = len(line)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=self._stream, flush=True)
