"""What ranks have exchanged, and the time that it took, by axis of the mesh and operation."""

from collections.abc import Iterable

from shoal.wire.base import Wire


class Traffic(Wire, frozen=True):
    """All calls of one operation on one axis, by one rank or by several.

    The times of several ranks are added up. A sum counts the ranks that know a time.
    """

    axis: str  # the axis of the mesh whose ranks take part
    operation: str
    count: int  # how many calls
    sent_bytes: int  # payload for other ranks; the backend may send more
    us: int | None = None  # microseconds in the operation; None: the backend cannot measure them
    waited_us: int | None = None  # the part of them in which it waited for other ranks; None: the backend cannot tell
    waited_for: tuple[tuple[int, int], ...] = ()  # the same as (rank, us): by the rank of all replicas that came last


def sum_traffic(parts: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """Return the sums by axis and operation, in the order in which these first appear."""
    return _combine(parts, ())


def traffic_since(before: Iterable[Traffic], now: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """Return what `now` has more than `before`, by axis and operation. What has not been called since is left out."""
    return tuple(each for each in _combine(now, before) if each.count)


def _combine(added: Iterable[Traffic], subtracted: Iterable[Traffic]) -> tuple[Traffic, ...]:
    totals: dict[tuple[str, str], _Total] = {}
    for sign, parts in ((1, added), (-1, subtracted)):
        for part in parts:
            totals.setdefault((part.axis, part.operation), _Total()).add(part, sign)
    return tuple(total.traffic(*key) for key, total in totals.items())


class _Total:
    """A sum of traffic on one axis by one operation."""

    def __init__(self) -> None:
        self._count = 0
        self._sent_bytes = 0
        self._us: int | None = None
        self._waited_us: int | None = None
        self._waited_for: dict[int, int] = {}

    def add(self, part: Traffic, sign: int) -> None:
        self._count += sign * part.count
        self._sent_bytes += sign * part.sent_bytes
        if part.us is not None:
            self._us = (self._us or 0) + sign * part.us
        if part.waited_us is not None:
            self._waited_us = (self._waited_us or 0) + sign * part.waited_us
        for rank, us in part.waited_for:
            self._waited_for[rank] = self._waited_for.get(rank, 0) + sign * us

    def traffic(self, axis: str, operation: str) -> Traffic:
        waits = tuple((rank, us) for rank, us in sorted(self._waited_for.items()) if us > 0)
        return Traffic(axis, operation, self._count, self._sent_bytes, self._us, self._waited_us, waits)
