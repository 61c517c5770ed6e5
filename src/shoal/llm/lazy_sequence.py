"""A sequence that makes its items when they are read."""

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

T_co = TypeVar("T_co", covariant=True)


class LazySequence(Sequence[T_co]):
    """A sequence whose items are made when they are read, and made again when they are read again.

    It is for items of which there may be very many: if all existed at once, the garbage collector would stop every
    thread while it goes through them.
    """

    def __init__(self, length: int, make: Callable[[int], T_co]) -> None:
        """Make no item yet. `make` returns the item at an index."""
        self._places = range(length)
        self._make = make

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> T_co: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[T_co, ...]: ...
    def __getitem__(self, place: int | slice) -> T_co | tuple[T_co, ...]:
        if isinstance(place, slice):
            return tuple(self._make(each) for each in self._places[place])
        return self._make(self._places[place])
