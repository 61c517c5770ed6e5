"""The outcome of a request: its times, its tokens or its failure."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.client.load.workload import PlannedRequest


@dataclass(frozen=True, slots=True)
class Failure:
    kind: str  # a short name for reports: HTTP 500, timeout, ...
    message: str


@dataclass(slots=True)
class LoadOutcome:
    """The outcome of a request. Times are in seconds from the start of the run.

    Latencies count from `arrival`, the time for which the request was planned, so that a request that was sent late
    does not look faster. Without a plan this is the time when it was sent.
    """

    request: PlannedRequest
    arrival: float
    sent: float
    ended: float
    first: float | None = None
    last: float | None = None
    stopped: float | None = None  # when the finish reason came
    prompt_tokens: int = 0
    output_tokens: int = 0
    counted: bool = False  # `output_tokens` was counted by the server; otherwise it is the number of chunks
    finish_reason: str | None = None
    gaps: Sequence[float] = ()  # seconds between chunks
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
        """Time per output token after the first. None with fewer than two tokens, or if all came at once.

        A chunk may have several tokens, and tokens without text may come after the last chunk, so the time is from the
        first token to the end.
        """
        end = self.last if self.stopped is None else self.stopped
        if self.first is None or end is None or end <= self.first or self.output_tokens < 2:
            return None
        return (end - self.first) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        return self.ended - self.arrival
