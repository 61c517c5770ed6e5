"""The queues of requests that wait for a replica."""

import heapq
from collections.abc import Iterator

from shoal.wire.engine import EngineRequest

Place = tuple[int, int, int]
"""The place of a request in a queue: its priority, the number of its arrival, and its own number."""


class WaitingQueues:
    """A queue for the requests that any replica may run, and one for each replica that alone may run some."""

    def __init__(self) -> None:
        self._requests: dict[int, tuple[EngineRequest, Place]] = {}
        self._shared = _Queue()
        self._by_replica: dict[int, _Queue] = {}  # none is empty

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, seq: int) -> bool:
        return seq in self._requests

    def __iter__(self) -> Iterator[int]:
        """Iterate over the numbers of the waiting requests, in no order."""
        return iter(self._requests)

    def add(self, request: EngineRequest, place: Place) -> None:
        self._requests[request.seq] = (request, place)
        queue = self._shared if request.replica < 0 else self._by_replica.setdefault(request.replica, _Queue())
        queue.push(place)

    def take(self, seq: int) -> EngineRequest:
        """Remove a request from its queue, wherever it is there, and return it."""
        request, place = self._requests.pop(seq)
        if request.replica < 0:
            self._shared.remove(place)
            return request
        queue = self._by_replica[request.replica]
        queue.remove(place)
        if not queue:
            del self._by_replica[request.replica]
        return request

    @property
    def first(self) -> Place | None:
        """The first place among the requests that any replica may run."""
        return self._shared.first if self._shared else None

    def first_of_each(self) -> Iterator[tuple[Place, int]]:
        """Iterate over the replicas with a queue of their own: the first place in it, and the replica."""
        return ((queue.first, number) for number, queue in self._by_replica.items())

    @property
    def num_entries(self) -> int:
        """The number of places in memory, including those of requests that have been removed."""
        return sum(queue.num_entries for queue in (self._shared, *self._by_replica.values()))

    def problems(self) -> list[str]:
        """Return what is inconsistent; [] if nothing is."""
        lengths = [len(self._shared), *(len(queue) for queue in self._by_replica.values())]
        if sum(lengths) != len(self._requests) or not all(lengths[1:]):
            return [f"{len(self._requests)} requests wait, but queues have {lengths}"]
        return []


class _Queue:
    """A heap of places. Removed places stay in it until they are first, or half of all."""

    def __init__(self) -> None:
        self._heap: list[Place] = []
        self._removed: set[Place] = set()

    def __len__(self) -> int:
        return len(self._heap) - len(self._removed)

    @property
    def first(self) -> Place:
        """The first place. The queue must not be empty."""
        return self._heap[0]

    @property
    def num_entries(self) -> int:
        return len(self._heap)

    def push(self, place: Place) -> None:
        heapq.heappush(self._heap, place)

    def remove(self, place: Place) -> None:
        self._removed.add(place)
        if 2 * len(self._removed) > len(self._heap):
            self._heap = [each for each in self._heap if each not in self._removed]
            self._removed.clear()
            heapq.heapify(self._heap)
        while self._heap and self._heap[0] in self._removed:
            self._removed.remove(heapq.heappop(self._heap))
