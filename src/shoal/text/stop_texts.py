"""Looking for many texts at once, character by character: Aho and Corasick, "Efficient string matching", 1975.

A character takes the same time for one text as for thousands, and what a search has found so far is one number.
"""

from array import array
from collections import deque
from collections.abc import Sequence

_SHIFT = 21  # bits of a character
_ROOT = 0


class StopTexts:
    """The automaton of some texts, none of them empty. Shared by all that look for the same ones; not to be changed.

    A state stands for the longest end of what was read that begins one of the texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._next: dict[int, int] = {}  # state and character -> state
        self._depth = array("i", [0])  # characters that a state stands for
        self._shorter = array("i", [_ROOT])  # the longest end of what a state stands for that is a state too
        self._found: list[str | None] = [None]  # the longest text that ends here
        self._goes_on = bytearray([True])  # is it the beginning of a longer text?
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
                following = self._next[key] = len(self._depth)
                self._goes_on[state] = True
                self._depth.append(self._depth[state] + 1)
                self._shorter.append(_ROOT)
                self._found.append(None)
                self._goes_on.append(False)
            state = following
        self._found[state] = text

    def _link(self) -> None:
        """Level by level: what is shorter is done before."""
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
        while True:
            following = self._next.get((state << _SHIFT) | character)
            if following is not None:
                return following
            if state == _ROOT:
                return _ROOT
            state = self._shorter[state]

    def held(self, state: int) -> int:
        """Characters at the end of what was read that may be the beginning of a text."""
        return self._depth[state]

    def read(self, state: int, new: str, *, counts: bool) -> tuple[int, tuple[int, str] | None]:
        """Reads on from a state, to the first end of a text if that counts.

        Returns:
            The state, and where a text ended: how many of the new characters that took, and of several texts the
            longest.
        """
        if state == _ROOT and self._firsts.isdisjoint(new):  # mostly
            return state, None
        for at, character in enumerate(new, 1):
            state = self.step(state, ord(character))
            found = self._found[state]
            if found is not None and counts:
                return state, (at, found)
            while not self._goes_on[state]:  # a whole text, which can't be the beginning of one
                state = self._shorter[state]
        return state, None
