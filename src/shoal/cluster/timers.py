"""When requests' time is up."""

import heapq
from collections.abc import Callable

_SLACK = 64


class Timers:
    """A time for each of some requests. Those that `is_open` denies are as if they had none, and are thrown out when
    they are more than half of all: a request that ends early is not kept until its time."""

    def __init__(self, is_open: Callable[[int], bool]) -> None:
        self._is_open = is_open
        self._heap: list[tuple[float, int]] = []
        self._kept = 0  # entries that were left when they were looked at last

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, seq: int) -> None:
        heapq.heappush(self._heap, (when, seq))
        if len(self._heap) > 2 * self._kept + _SLACK:
            self.clean()

    def clean(self) -> None:
        """Throws out what is of no use."""
        self._heap = [entry for entry in self._heap if self._is_open(entry[1])]
        heapq.heapify(self._heap)
        self._kept = len(self._heap)

    @property
    def next(self) -> float | None:
        """When somebody's time is up; None: never."""
        while self._heap and not self._is_open(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[int]:
        """Whose time is up; they have none any more."""
        found = []
        while (when := self.next) is not None and when <= now:
            found.append(heapq.heappop(self._heap)[1])
        return found
