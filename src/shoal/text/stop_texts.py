"""Searching for many stop texts at once, by the algorithm of Aho and Corasick ("Efficient string matching", 1975).

The time per character does not depend on the number of texts, and the state of a search is one number.
"""

from array import array
from collections import deque
from collections.abc import Sequence

_SHIFT = 21  # bits of a character
_ROOT = 0


class StopTexts:
    """An automaton that searches for some texts, none of them empty.

    All outputs with the same stop texts share one, so it is never changed. A state stands for a beginning of one of the
    texts: the longest one that the characters read so far end with.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._next: dict[int, int] = {}  # (state << _SHIFT) | character -> state
        # For each state:
        self._length = array("i", [0])  # the number of characters that it stands for
        self._shorter = array("i", [_ROOT])  # the state for the longest proper end of these characters that has one
        self._found: list[str | None] = [None]  # the longest text that these characters end with
        self._can_continue = bytearray([True])  # whether they are the beginning of a longer text
        self._firsts = frozenset(text[0] for text in texts)
        for text in texts:
            self._add(text)
        self._link()

    def _add(self, text: str) -> None:
        state = _ROOT
        for character in text:
            key = (state << _SHIFT) | ord(character)
            following = self._next.get(key)
            if following is None:
                following = self._next[key] = len(self._length)
                self._can_continue[state] = True
                self._length.append(self._length[state] + 1)
                self._shorter.append(_ROOT)
                self._found.append(None)
                self._can_continue.append(False)
            state = following
        self._found[state] = text

    def _link(self) -> None:
        """Set `_shorter` and `_found` of all states, shorter ones first."""
        children: dict[int, list[tuple[int, int]]] = {}
        for key, following in self._next.items():
            children.setdefault(key >> _SHIFT, []).append((key & ((1 << _SHIFT) - 1), following))
        pending = deque([_ROOT])
        while pending:
            state = pending.popleft()
            for character, following in children.get(state, ()):
                if state != _ROOT:
                    self._shorter[following] = self.step(self._shorter[state], character)
                if self._found[following] is None:
                    self._found[following] = self._found[self._shorter[following]]
                pending.append(following)

    def step(self, state: int, character: int) -> int:
        """Return the state after one more character, given by its code."""
        while True:
            following = self._next.get((state << _SHIFT) | character)
            if following is not None:
                return following
            if state == _ROOT:
                return _ROOT
            state = self._shorter[state]

    def held(self, state: int) -> int:
        """Return how many of the last characters may be the beginning of a text."""
        return self._length[state]

    def read(self, state: int, new: str, *, may_stop: bool) -> tuple[int, tuple[int, str] | None]:
        """Read new characters from a state on, and stop at the end of the first text if `may_stop`.

        Returns:
            The new state; and if a text was found, the number of new characters up to its end, and the text. If several
            texts end there, it is the longest.
        """
        if state == _ROOT and self._firsts.isdisjoint(new):  # the usual case
            return state, None
        for at, character in enumerate(new, 1):
            state = self.step(state, ord(character))
            found = self._found[state]
            if found is not None and may_stop:
                return state, (at, found)
            while not self._can_continue[state]:  # a complete text, which is not the beginning of another one
                state = self._shorter[state]
        return state, None
