"""How long steps take, and after which time a step may hang."""

_FLOOR_S = 5.0  # no step is suspected before
_FACTOR = 10.0  # ... nor before so many times the longest step like it
_DECAY = 0.99  # by which a longest time counts less with every step
_FIRST_S = 60.0  # ... nor before, if it is larger than all steps so far


class StepDurations:
    """The longest durations of steps so far, by their size: the number of tokens, in powers of two."""

    def __init__(self) -> None:
        self._longest: dict[int, float] = {}

    def note(self, tokens: int, seconds: float) -> None:
        size = tokens.bit_length()
        self._longest[size] = max(seconds, _DECAY * self._longest.get(size, 0.0))

    def longest(self, tokens: int) -> float | None:
        """Return the longest time that a step of this size has taken; None if all steps so far were smaller.

        If no step had this size, the steps of larger sizes count.
        """
        size = tokens.bit_length()
        if size in self._longest:
            return self._longest[size]
        return max((seconds for each, seconds in self._longest.items() if each > size), default=None)

    def limit(self, tokens: int) -> float:
        """Return the seconds after which a step with so many tokens may hang."""
        longest = self.longest(tokens)
        if longest is not None:
            return max(_FLOOR_S, _FACTOR * longest)
        per_token = max((seconds / float(1 << size) for size, seconds in self._longest.items()), default=0.0)
        return max(_FIRST_S, _FACTOR * per_token * float(1 << tokens.bit_length()))
