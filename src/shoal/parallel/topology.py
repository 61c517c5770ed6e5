"""The grid of ranks: it has named axes, and communication groups are slices of it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """A grid of ranks.

    `axes` has (name, size) of each axis, the outermost first. Consecutive ranks differ in the last axis.
    """

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, *, dp: int = 1, pp: int = 1, tp: int = 1) -> "Topology":
        return cls((("dp", dp), ("pp", pp), ("tp", tp)))

    @property
    def world_size(self) -> int:
        return math.prod(size for _, size in self.axes)

    def size(self, axis: str) -> int:
        return dict(self.axes)[axis]

    def coord(self, rank: int) -> dict[str, int]:
        """Return the rank's index on each axis, by the name of the axis."""
        found: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, found[name] = divmod(rank, size)
        return found

    def rank(self, coord: dict[str, int]) -> int:
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coord[name]
        return rank

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """Return `rank` and the ranks that differ from it in `axis` alone, in the order of that axis."""
        return self.plane((axis,), rank)

    def plane(self, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """Return `rank` and the ranks that differ from it in these axes alone, in ascending order."""
        coord = self.coord(rank)
        fixed = {name: index for name, index in coord.items() if name not in axes}
        return tuple(other for other in range(self.world_size) if fixed.items() <= self.coord(other).items())
