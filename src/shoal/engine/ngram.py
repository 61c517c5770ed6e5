"""Prompt lookup (Saxena, 2023): what followed the last tokens when the text had them before is likely to come again."""

from collections.abc import Sequence

from shoal.wire.base import Ids


class NgramIndex:
    """The text of one request, and where each of its runs of `shortest` to `longest` tokens was last followed.

    It holds one table entry for every token and length.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"runs of {shortest} to {longest} tokens: 1 <= shortest <= longest must hold")
        self._tokens: list[int] = []
        # Longer runs come first: (length, {run: position of the token that followed it the last time}).
        self._tables: list[tuple[int, dict[Ids, int]]] = [(n, {}) for n in range(longest, shortest - 1, -1)]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            place = len(self._tokens)
            for length, table in self._tables:
                if length <= place:
                    table[tuple(self._tokens[place - length :])] = place
            self._tokens.append(token)

    def propose(self, count: int) -> Ids:
        """Return up to `count` tokens: those behind the last earlier occurrence of the longest run that ends the text.

        If the text ends before `count` tokens are copied, the copy goes on with its own first tokens, as if the text
        repeated itself. Nothing is returned if no run occurred before.
        """
        size = len(self._tokens)
        for length, table in self._tables:
            if length < size and (start := table.get(tuple(self._tokens[size - length :]))) is not None:
                period = size - start
                return tuple(self._tokens[start + i % period] for i in range(count))
        return ()
