"""When a replica that ended is started again, and when no more. Free of processes and clocks."""

from collections import deque
from dataclasses import dataclass, field

_WINDOW_S = 3600.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_MOST_USELESS = 5  # lives in a row that did nothing


@dataclass(slots=True)
class Restarts:
    """Of one replica. A life is of use if the replica has drawn a token in it, or was ready for a while: the next start
    follows at once. Behind useless ones the pause doubles, and after a few of them in a row, or `most` restarts within
    an hour, nobody starts it again."""

    most: int
    count: int = 0
    _times: deque[float] = field(default_factory=deque)
    _useless: int = 0

    def pause(self, now: float, *, useful: bool) -> float | None:
        """Seconds to wait before the next start; None: there is none. `useful`: the life that has just ended was."""
        self._useless = 0 if useful else self._useless + 1
        while self._times and now - self._times[0] > _WINDOW_S:
            self._times.popleft()
        if len(self._times) >= self.most or self._useless >= _MOST_USELESS:
            return None
        self._times.append(now)
        self.count += 1
        if not self._useless:
            return 0.0
        return min(_FIRST_PAUSE_S * 2.0 ** (self._useless - 1), _LONGEST_PAUSE_S)

    @property
    def why_not(self) -> str:
        """After a None."""
        if self._useless >= _MOST_USELESS:
            return f"it ended {self._useless} times in a row without a token"
        return f"it was started again {len(self._times)} times within an hour (--max-restarts {self.most})"
