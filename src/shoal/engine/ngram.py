"""Prompt lookup (Saxena, 2023): what followed the last tokens when the text had them before is likely to come again."""

from collections.abc import Sequence

from shoal.wire.base import Ids


class NgramIndex:
    """The text of one request, and where each of its runs of `shortest` to `longest` tokens was last followed.

    Costs one table entry for every token and length.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"lengths from {shortest} to {longest}: they must be at least 1, the longest no shorter")
        self._tokens: list[int] = []
        # Longer runs come first. A run -> the place of what followed it the last time.
        self._tables: list[tuple[int, dict[Ids, int]]] = [(n, {}) for n in range(longest, shortest - 1, -1)]

    def extend(self, tokens: Sequence[int]) -> None:
        """They follow what there is."""
        for token in tokens:
            place = len(self._tokens)
            for length, table in self._tables:
                if length <= place:
                    table[tuple(self._tokens[place - length :])] = place
            self._tokens.append(token)

    def propose(self, count: int) -> Ids:
        """Up to `count` tokens: those behind the latest earlier occurrence of the longest run that the text ends with.

        Where the text's end comes first, the copy goes on with what it has copied itself: the text is taken to repeat.
        None, if no run was there before.
        """
        size = len(self._tokens)
        for length, table in self._tables:
            if length < size and (start := table.get(tuple(self._tokens[size - length :]))) is not None:
                period = size - start
                return tuple(self._tokens[start + i % period] for i in range(count))
        return ()
