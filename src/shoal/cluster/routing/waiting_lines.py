"""Requests that wait for a replica, in the order in which they are dealt out."""

import heapq
from collections.abc import Iterator

from shoal.wire.engine import EngineRequest

Place = tuple[int, int, int]  # in a line: priority, arrival, request


class WaitingLines:
    """One line for the requests that any replica may run, and one for each replica that alone may run some."""

    def __init__(self) -> None:
        self._requests: dict[int, tuple[EngineRequest, Place]] = {}
        self._shared = _Line()
        self._own: dict[int, _Line] = {}  # by replica; none is empty

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, seq: int) -> bool:
        return seq in self._requests

    def __iter__(self) -> Iterator[int]:
        """The numbers of the requests that wait, in no order."""
        return iter(self._requests)

    def add(self, request: EngineRequest, place: Place) -> None:
        self._requests[request.seq] = (request, place)
        line = self._shared if request.replica < 0 else self._own.setdefault(request.replica, _Line())
        line.push(place)

    def take(self, seq: int) -> EngineRequest:
        """Take a request out of its line, wherever it stands."""
        request, place = self._requests.pop(seq)
        if request.replica < 0:
            self._shared.leave(place)
            return request
        line = self._own[request.replica]
        line.leave(place)
        if not line:
            del self._own[request.replica]
        return request

    @property
    def first(self) -> Place | None:
        """The first place among the requests that any replica may run."""
        return self._shared.first if self._shared else None

    def first_of_each(self) -> Iterator[tuple[Place, int]]:
        """The first place in each replica's own line, with the replica."""
        return ((line.first, number) for number, line in self._own.items())

    @property
    def kept(self) -> int:
        """Places that are kept in memory, those that were left included."""
        return sum(line.kept for line in (self._shared, *self._own.values()))

    def problems(self) -> list[str]:
        """Return what is wrong with the books; [] if nothing is."""
        lengths = [len(self._shared), *(len(line) for line in self._own.values())]
        if sum(lengths) != len(self._requests) or not all(lengths[1:]):
            return [f"{len(self._requests)} requests wait, but lines have {lengths}"]
        return []


class _Line:
    """A line of places. Those that leave it from the middle are remembered until they are half of all."""

    def __init__(self) -> None:
        self._heap: list[Place] = []
        self._left: set[Place] = set()

    def __len__(self) -> int:
        return len(self._heap) - len(self._left)

    @property
    def first(self) -> Place:
        """The first place. There must be one."""
        return self._heap[0]

    @property
    def kept(self) -> int:
        return len(self._heap)

    def push(self, place: Place) -> None:
        heapq.heappush(self._heap, place)

    def leave(self, place: Place) -> None:
        self._left.add(place)
        if 2 * len(self._left) > len(self._heap):
            self._heap = [each for each in self._heap if each not in self._left]
            self._left.clear()
            heapq.heapify(self._heap)
        while self._heap and self._heap[0] in self._left:
            self._left.remove(heapq.heappop(self._heap))
