"""Requests as slices of a trace: the time in queues, the prompt, and the decoding of the output."""

from collections.abc import Callable
from dataclasses import dataclass

from shoal.trace.clocks import now
from shoal.wire.engine import EngineRequest, Finish, SeqUpdate


@dataclass(slots=True)
class RequestTimes:
    """When something has happened to a request, and what it was. Times of 0 have not come."""

    lane: int
    name: str
    prompt_tokens: int
    arrival: int
    output: int = 0  # its number among the outputs of its prompt
    dispatched: int = 0  # to the replica that had it last
    begun: int = 0  # its first step
    first: int = 0  # its first token has come
    ended: int = 0
    replica: int = 0
    tokens: int = 0
    cached_tokens: int = 0
    outcome: str = ""


class RequestSlices:
    """Takes the times of requests, as a `Recorder`. It knows those that have arrived since it was made.

    A request has a lane, a track for itself, from its arrival to its end; then the lane is free for others.
    """

    def __init__(self, done: Callable[[RequestTimes], object]) -> None:
        """`done` is called with the times of each request that has ended."""
        self._done = done
        self._open: dict[int, RequestTimes] = {}
        self._free: dict[int, int] = {}  # lane -> when its last request has ended
        self._lanes = 0

    def added(self, request: EngineRequest) -> None:
        arrival = int(request.arrival * 1e9) or now()
        self._open[request.seq] = RequestTimes(
            self._lane_since(arrival),
            request.name or str(request.seq),
            request.num_prompt_tokens,
            arrival,
            output=request.sampling.sample_index,
        )

    def _lane_since(self, arrival: int) -> int:
        """Return a lane that was free already when a request arrived."""
        lane = min((lane for lane, ended in self._free.items() if ended <= arrival), default=None)
        if lane is None:
            self._lanes += 1
            return self._lanes - 1
        del self._free[lane]
        return lane

    def dispatched(self, seq: int, replica: int) -> None:
        if times := self._open.get(seq):
            times.dispatched, times.replica = now(), replica

    def updated(self, replica: int, update: SeqUpdate) -> None:
        times = self._open.get(update.seq)
        if times is None:
            return
        if update.tokens and not times.first:
            times.first = now()
            begun = (times.dispatched or times.arrival) + update.waited_us * 1000
            times.begun = min(max(begun, times.arrival), times.first)
            times.cached_tokens = update.cached_tokens
        times.tokens += len(update.tokens)
        if update.finish is not None:
            self._end(update)

    def stopped(self, seq: int) -> None:
        if times := self._open.get(seq):
            times.outcome = "stop"

    def ended(self, update: SeqUpdate) -> None:
        self._end(update)

    def _end(self, update: SeqUpdate) -> None:
        times = self._open.pop(update.seq, None)
        if times is None:
            return
        finish = Finish.ABORT if update.finish is None else update.finish
        times.outcome = update.error or times.outcome or finish.name.lower()
        self._close(times)

    def end_all(self) -> None:
        """End the requests that are still open, since the trace ends."""
        for times in self._open.values():
            times.outcome = "has not ended"
            self._close(times)
        self._open.clear()

    def _close(self, times: RequestTimes) -> None:
        times.ended = now()
        self._free[times.lane] = times.ended
        self._done(times)
