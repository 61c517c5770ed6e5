"""Prompt lookup (Saxena, 2023): if the last tokens occurred before, the tokens that followed them are good drafts."""

from collections.abc import Sequence

from shoal.wire.base import Ids


class NgramIndex:
    """The tokens of one request, and for each n-gram of `shortest` to `longest` tokens where it occurred last.

    There is one table entry for every token and length.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-grams of {shortest} to {longest} tokens: 1 <= shortest <= longest must hold")
        self._tokens: list[int] = []
        # Longer n-grams come first: (length, {n-gram: position of the token after its last occurrence}).
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
        """Return `count` tokens, copied from the text after the last earlier occurrence of the n-gram that ends it.

        The longest n-gram that occurred before is used; if there is none, the result is empty. If the text ends before
        `count` tokens are copied, the copy starts again with its first token, as if the text repeated itself.
        """
        size = len(self._tokens)
        for length, table in self._tables:
            if length < size and (start := table.get(tuple(self._tokens[size - length :]))) is not None:
                period = size - start
                return tuple(self._tokens[start + i % period] for i in range(count))
        return ()
