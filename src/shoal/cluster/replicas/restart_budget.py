"""The number of restarts that a process may have, and the pauses before them."""

from collections import deque
from dataclasses import dataclass, field

_WINDOW_S = 3600.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_MOST_USELESS = 5  # runs in a row that did no work


@dataclass(slots=True)
class RestartBudget:
    """The restarts of one process, and how many more it may have.

    A run is useful if it did some work or lasted for a while. After a useful run the process is started again
    immediately, after useless runs after a pause that doubles. It is not started again after a few useless runs in a
    row, or after `most` restarts within an hour.
    """

    most: int
    option: str = ""  # the option that sets `most`, if there is one
    _times: deque[float] = field(default_factory=deque)
    _useless: int = 0

    def pause(self, now: float, *, useful: bool) -> float | None:
        """Return the seconds until the next start; None if there is none.

        Args:
            useful: True if the run that has just ended was useful.
        """
        self._useless = 0 if useful else self._useless + 1
        while self._times and now - self._times[0] > _WINDOW_S:
            self._times.popleft()
        if len(self._times) >= self.most or self._useless >= _MOST_USELESS:
            return None
        self._times.append(now)
        if not self._useless:
            return 0.0
        return min(_FIRST_PAUSE_S * 2.0 ** (self._useless - 1), _LONGEST_PAUSE_S)

    @property
    def why_not(self) -> str:
        """The reason why `pause` returned None."""
        if self._useless >= _MOST_USELESS:
            return f"it ended {self._useless} times in a row before it had done any work"
        limit = f" ({self.option} {self.most})" if self.option else ""
        return f"it was started again {len(self._times)} times within an hour{limit}"
