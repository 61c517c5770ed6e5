"""What became of a request."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.client.load.workload import Planned


@dataclass(frozen=True, slots=True)
class Failure:
    kind: str  # as in reports: HTTP 500, timeout, ...
    message: str


@dataclass(slots=True)
class LoadOutcome:
    """Times in seconds from the start of the run.

    Latencies count from `arrival`, the time for which the request was planned, so that a request that could not be
    sent in time is not flattered by it. Without a plan that is when it was sent.
    """

    request: Planned
    arrival: float
    sent: float
    ended: float
    first: float | None = None
    last: float | None = None
    stopped: float | None = None  # when the server said that it was the end
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False  # by the server; else by chunks
    finish_reason: str | None = None
    gaps: Sequence[float] = ()  # between chunks
    failure: Failure | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None

    @property
    def late(self) -> float:
        return self.sent - self.arrival

    @property
    def ttft(self) -> float | None:
        """Time to first token."""
        return None if self.first is None else self.first - self.arrival

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; a chunk may hold several, and tokens without text come before the
        end. None with fewer than two tokens, or where all came at once."""
        end = self.last if self.stopped is None else self.stopped
        if self.first is None or end is None or end <= self.first or self.output_tokens < 2:
            return None
        return (end - self.first) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        return self.ended - self.arrival
