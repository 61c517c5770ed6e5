"""An estimate of how many more tokens an output will get, learned from outputs that have ended."""

from math import expm1

_MEMORY = 4096.0  # ends; whenever there are so many, all that is known is halved, so that newer outputs count more
_PRIOR = 16.0  # drawn tokens at some length that count as much as the rate over all lengths


class OutputLengths:
    """The rate at which outputs end by themselves, as a function of their length.

    The rate is constant within pieces of lengths, which begin at 0, 1, 2, 4, 8, ... tokens: the number of ends over the
    number of tokens drawn there. An output that reached its limit counts as drawn tokens without an end, because it
    does not show how long it would have become. This is the piecewise exponential model with censored observations
    (Friedman, "Piecewise exponential models for survival data with covariates", 1982).

    Until an output has ended by itself, every output is expected to reach its limit.
    """

    def __init__(self) -> None:
        self._ends: list[float] = []  # by piece
        self._drawn: list[float] = []
        self._all_ends = 0.0
        self._all_drawn = 0.0

    def ended(self, first: int, last: int, by_itself: bool) -> None:
        """Learn from an output that was seen from a length of `first` tokens on, and ended at a length of `last`.

        Args:
            by_itself: False if it ended at its limit.
        """
        if last == first:
            return
        pieces = range(first.bit_length(), (last - 1).bit_length() + 1)
        while len(self._ends) < pieces.stop:
            self._ends.append(0.0)
            self._drawn.append(0.0)
        for piece in pieces:
            self._drawn[piece] += min(last, 1 << piece) - max(first, 1 << piece >> 1)
        self._all_drawn += last - first
        if by_itself:
            self._ends[pieces.stop - 1] += 1
            self._all_ends += 1
            if self._all_ends >= _MEMORY:
                self._halve()

    def expected_rest(self, length: int, allowed: int) -> int:
        """Return how many more tokens an output of `length` tokens is expected to get; at least one.

        Args:
            allowed: the most that it may get.
        """
        rest, alive = 0.0, 1.0
        while allowed > 0 and alive > 0.01:
            piece = length.bit_length()
            width = min((1 << piece) - length, allowed)
            rate = self._rate(piece)
            ending = -expm1(-rate * width)
            rest += alive * (ending / rate if rate * width > 1e-9 else width)
            alive *= 1 - ending
            length += width
            allowed -= width
        return max(round(rest), 1)

    def _rate(self, piece: int) -> float:
        overall = self._all_ends / (self._all_drawn + 1)
        if piece >= len(self._ends):
            return overall
        return (self._ends[piece] + _PRIOR * overall) / (self._drawn[piece] + _PRIOR)

    def _halve(self) -> None:
        self._ends = [count / 2 for count in self._ends]
        self._drawn = [count / 2 for count in self._drawn]
        self._all_ends /= 2
        self._all_drawn /= 2
