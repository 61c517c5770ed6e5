"""The buffer of a process that records events: six numbers for each, so that recording costs little."""

from array import array

from shoal.wire.trace import ROW, EventKind

# Events that a process keeps until it is asked for them: 10 MB. A rank is asked about once a second.
CAPACITY = 200_000


class EventBuffer:
    """Events that have not been asked for yet. One thread uses it."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._most = capacity * ROW
        self._rows = array("q")
        self._names: dict[str, int] = {}
        self._dropped = 0

    def __len__(self) -> int:
        return len(self._rows) // ROW

    def add(self, kind: EventKind, begun: int, ended: int, a: int = 0, b: int = 0, c: int = 0) -> None:
        """Add a slice of time. What the numbers mean is said at each kind."""
        if len(self._rows) >= self._most:
            self._dropped += 1
            return
        self._rows.extend((kind, begun, ended - begun, a, b, c))

    def name(self, text: str) -> int:
        """Return the number of a name in the events."""
        return self._names.setdefault(text, len(self._names))

    def take(self) -> tuple[bytes, tuple[str, ...], int]:
        """Return all rows, the names and how many events were dropped, and empty the buffer."""
        found = self._rows.tobytes(), tuple(self._names), self._dropped
        del self._rows[:]
        self._dropped = 0
        return found
