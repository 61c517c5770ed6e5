"""The rule for replacing ranks that have died: not if a request may be the cause, and not without end."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shoal.engine.request import Request
from shoal.errors import RanksDied

_MOST_IN_A_ROW = 2  # deaths without any work between them
_MOST_WITH_A_REQUEST = 2  # deaths with the same request, which made no progress between them
_SAME_PLACE = 16  # tokens: a request that draws at least so many between two deaths has made progress
_USEFUL_S = 60.0  # ranks that have lived for so long were useful, even if they did no work


@dataclass(slots=True)
class _Suspect:
    """A request that was in flight when a rank died."""

    length: int  # the number of its tokens at that time
    deaths: int  # without progress in between


class RankDeaths:
    """The deaths of ranks of one engine so far."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._in_a_row = 0
        self._last = float("-inf")
        self._suspects: dict[int, _Suspect] = {}

    def note_work(self) -> None:
        """Note that the ranks have computed a step."""
        self._in_a_row = 0

    def note_death(self, in_flight: Iterable[Request], *, here: bool = True) -> str:
        """Note that ranks have died, and return the reason why they should not be replaced; "": they should.

        Args:
            in_flight: the requests that had work in the steps that are lost.
            here: False if the ranks belong to another replica, whose engine counts how often they die in a row. They
                may still have died from a request of this one, whose tokens they got.
        """
        if here:
            now = self._clock()
            self._in_a_row = 1 if now - self._last > _USEFUL_S else self._in_a_row + 1
            self._last = now
        suspects = {request.message.seq: self._suspect(request) for request in in_flight}
        if suspects:  # a death while the ranks are being replaced says nothing about requests
            self._suspects = suspects
        if self._in_a_row > _MOST_IN_A_ROW:
            return f"ranks have died {self._in_a_row} times in a row before any step was computed"
        worst = max((suspect.deaths for suspect in suspects.values()), default=0)
        if worst > _MOST_WITH_A_REQUEST:
            return f"ranks have died {worst} times with the same request"
        return ""

    def _suspect(self, request: Request) -> _Suspect:
        length = len(request.tokens)
        known = self._suspects.get(request.message.seq)
        if known is None or length - known.length >= _SAME_PLACE:
            return _Suspect(length, 1)
        return _Suspect(length, known.deaths + 1)


def describe_replacement(error: RanksDied) -> str:
    """Return what the engine does when ranks have died, for the log and for its stats."""
    if not error.ranks:
        return f"{error}; the ranks of this replica form their groups anew, and keep their weights"
    them = "they are" if len(error.ranks) > 1 else "it is"
    return f"{error}; {them} replaced, the other ranks keep their weights"
