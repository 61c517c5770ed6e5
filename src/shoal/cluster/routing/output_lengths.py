"""How many more tokens an output is expected to get, learned from those that have ended."""

from math import expm1

_MEMORY = 4096.0  # ends: when there are as many, each counts half from then on
_PRIOR = 16.0  # tokens: how much drawing it takes at some length to outweigh what is known of all lengths


class OutputLengths:
    """The rate at which outputs end by themselves, piecewise constant over their length: in each piece, which begin at
    0, 1, 2, 4, 8, ... tokens, the ends over the tokens that were drawn. An output that reached its limit counts as
    drawn but not as an end: it says nothing about how long it would have become. (The piecewise exponential model with
    censored observations; Friedman, "Piecewise exponential models for survival data with covariates", 1982.)

    While nothing has ended by itself, an output is expected to become as long as it may.
    """

    def __init__(self) -> None:
        self._ends: list[float] = []  # by piece
        self._drawn: list[float] = []
        self._all_ends = 0.0
        self._all_drawn = 0.0

    def ended(self, first: int, last: int, by_itself: bool) -> None:
        """An output was watched growing from `first` tokens to `last`, where it ended, by itself or at its limit."""
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
                self._fade()

    def rest(self, length: int, allowed: int) -> int:
        """Expected tokens of an output that has `length` and may get `allowed` more; at least one."""
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

    def _fade(self) -> None:
        self._ends = [count / 2 for count in self._ends]
        self._drawn = [count / 2 for count in self._drawn]
        self._all_ends /= 2
        self._all_drawn /= 2
