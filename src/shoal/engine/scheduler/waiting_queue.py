"""Requests that wait for a place: their order, and their deadlines."""

import heapq
from collections.abc import Callable, Collection
from itertools import islice

from shoal.engine.request import Request, RequestState
from shoal.wire.engine import EngineRequest

_FEW_DEADLINES = 64


class PriorityPolicy:
    """The lower priority number first; among equals, who came first."""

    def sort_key(self, request: EngineRequest, arrival: int) -> tuple[int, ...]:
        return (request.priority, arrival)


class WaitingQueue:
    """Requests in state WAITING, in the policy's order.

    A request that leaves that state leaves the queue without being taken out.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, ...], int, Request]] = []  # may hold requests that wait no longer

    def __len__(self) -> int:
        """An upper bound: requests that have ended since may be counted."""
        return len(self._heap)

    def push(self, request: Request) -> None:
        request.state = RequestState.WAITING
        heapq.heappush(self._heap, (request.sort_key, request.message.seq, request))

    def first(self) -> Request | None:
        while self._heap and self._heap[0][2].state is not RequestState.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> None:
        """Remove the request that `first` has just returned."""
        heapq.heappop(self._heap)

    def push_if_drained(self, request: Request) -> None:
        """Let a preempted request wait again, once its results in flight and its verdict are there."""
        if request.state is not RequestState.DRAINING or request.in_flight:
            return
        if request.constraint is None or request.constraint.verdict is not None:
            request.epoch += 1
            self.push(request)

    def tokens_of_first(self, count: int) -> int:
        """Tokens of the first `count` requests, an estimate: those that a heap has in front are about the first."""
        waiting = (request for *_, request in self._heap if request.state is RequestState.WAITING)
        return sum(len(request.tokens) for request in islice(waiting, count))


class Deadlines:
    """Times by which requests must have ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int]] = []  # may hold requests that have ended

    def add(self, deadline: float, seq: int) -> None:
        heapq.heappush(self._heap, (deadline, seq))

    def pop_passed(self, unfinished: Collection[int]) -> list[int]:
        """Return the requests whose deadline has passed; some of them may have ended already."""
        if len(self._heap) > 2 * len(unfinished) + _FEW_DEADLINES:  # most are of requests that have ended
            self._heap = [entry for entry in self._heap if entry[1] in unfinished]
            heapq.heapify(self._heap)
        passed = []
        while self._heap and self._heap[0][0] <= self._clock():
            passed.append(heapq.heappop(self._heap)[1])
        return passed
