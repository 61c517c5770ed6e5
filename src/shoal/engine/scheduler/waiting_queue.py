"""The queue of waiting requests, and the deadlines of all requests."""

import heapq
from collections.abc import Callable, Collection
from itertools import islice

from shoal.engine.request import Request, RequestState
from shoal.wire.engine import EngineRequest

_FEW_DEADLINES = 64


class PriorityPolicy:
    """Serves the lowest priority number first; among equal ones, the request that came first."""

    def sort_key(self, request: EngineRequest, arrival: int) -> tuple[int, ...]:
        return (request.priority, arrival)


class WaitingQueue:
    """Requests in state WAITING, in the policy's order.

    A request that leaves this state leaves the queue by itself; the caller need not remove it.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, ...], int, Request]] = []  # may hold requests that no longer wait

    def __len__(self) -> int:
        """Return an upper bound, which may count requests that have ended."""
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
        """Put a preempted request into the queue, if its results in flight and its verdict have come."""
        if request.state is not RequestState.DRAINING or request.in_flight:
            return
        if request.constraint is None or request.constraint.verdict is not None:
            request.epoch += 1
            self.push(request)

    def tokens_of_first(self, count: int) -> int:
        """Estimate the number of tokens of the first `count` requests. The order of the heap is only roughly sorted."""
        waiting = (request for *_, request in self._heap if request.state is RequestState.WAITING)
        return sum(len(request.tokens) for request in islice(waiting, count))


class Deadlines:
    """The times by which requests must have ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int]] = []  # may hold requests that have ended

    def add(self, deadline: float, seq: int) -> None:
        heapq.heappush(self._heap, (deadline, seq))

    def pop_passed(self, unfinished: Collection[int]) -> list[int]:
        """Return the requests whose deadline has passed; some of them may have ended already."""
        if len(self._heap) > 2 * len(unfinished) + _FEW_DEADLINES:  # most belong to requests that have ended
            self._heap = [entry for entry in self._heap if entry[1] in unfinished]
            heapq.heapify(self._heap)
        passed = []
        while self._heap and self._heap[0][0] <= self._clock():
            passed.append(heapq.heappop(self._heap)[1])
        return passed
