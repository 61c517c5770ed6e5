"""A queue of the times at which requests expire."""

import heapq
from collections.abc import Callable

_SLACK = 64  # entries by which the queue may grow before it is worth looking for useless ones


class ExpiryQueue:
    """A queue of requests, each with the time at which it expires.

    A request for which `is_open` returns False has no timer any more. Entries of such requests are deleted before they
    are much more than half of the queue, so a request that ends early does not stay in memory until its time.
    """

    def __init__(self, is_open: Callable[[int], bool]) -> None:
        self._is_open = is_open
        self._heap: list[tuple[float, int]] = []
        self._num_cleaned = 0  # the length of the queue after the last `clean`

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, seq: int) -> None:
        heapq.heappush(self._heap, (when, seq))
        if len(self._heap) > 2 * self._num_cleaned + _SLACK:
            self.clean()

    def clean(self) -> None:
        """Delete the entries of requests that are not open."""
        self._heap = [entry for entry in self._heap if self._is_open(entry[1])]
        heapq.heapify(self._heap)
        self._num_cleaned = len(self._heap)

    @property
    def next_time(self) -> float | None:
        """The time at which the next request expires; None if there is none."""
        while self._heap and not self._is_open(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_expired(self, now: float) -> list[int]:
        """Return the requests whose time has come, and remove them from the queue."""
        expired = []
        while (when := self.next_time) is not None and when <= now:
            expired.append(heapq.heappop(self._heap)[1])
        return expired
