"""Sequences that take no memory for their items."""

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

T_co = TypeVar("T_co", covariant=True)


class OnDemand(Sequence[T_co]):
    """Items that are made when somebody looks at them, each time anew: all at once they would be so many objects that
    the garbage collector holds up every thread while it looks through them."""

    def __init__(self, length: int, make: Callable[[int], T_co]) -> None:
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
