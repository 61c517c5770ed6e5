"""Prompts of a wanted number of tokens."""

import random
from collections.abc import Mapping
from typing import Protocol, TypeAlias

Prompt: TypeAlias = str | list[int]

_TEXT = (
    "a I to of in is it on we be 1 2 3 4 5 6 7 8 9 at by or so up one two the and for you that with this from have are"
    " not but all can will more about time people water house tree river mountain light paper green yellow small large"
    " open close between during because morning history language music number question together important"
)
WORDS = _TEXT.split()
_FIRST_SAFE_ID = 4  # the ids before it are often markers of a text's begin and end


class Prompts(Protocol):
    def make(self, tokens: int, draw: random.Random, *, behind: bool = False) -> Prompt:
        """A prompt of so many tokens. `behind`: it is to be joined to another."""
        ...

    def join(self, first: Prompt, second: Prompt) -> Prompt: ...


class IdPrompts:
    """Token ids below `vocab_size`."""

    def __init__(self, vocab_size: int) -> None:
        self._ids = range(min(_FIRST_SAFE_ID, vocab_size - 1), vocab_size)

    def make(self, tokens: int, draw: random.Random, *, behind: bool = False) -> Prompt:
        return draw.choices(self._ids, k=tokens)

    def join(self, first: Prompt, second: Prompt) -> Prompt:
        return [*first, *second]


class WordPrompts:
    """Texts of words. `costs`: tokens that each word adds to a text; `starts`: tokens of a text of this word alone,
    where that is another number."""

    def __init__(self, costs: Mapping[str, float], starts: Mapping[str, float] | None = None) -> None:
        self._costs = costs
        self._starts = costs if starts is None else starts
        self._words = list(costs)
        self._dearest = max(costs.values())

    def make(self, tokens: int, draw: random.Random, *, behind: bool = False) -> Prompt:
        """The cheapest word where none fits in."""
        words: list[str] = []
        left = float(tokens)
        costs = self._costs if behind else self._starts
        while fitting := [word for word, cost in costs.items() if cost <= left]:
            words.append(draw.choice(fitting))
            left -= costs[words[-1]]
            costs = self._costs
            while left >= self._dearest:
                words.append(draw.choice(self._words))
                left -= costs[words[-1]]
        return " ".join(words) or min(costs, key=costs.__getitem__)

    def join(self, first: Prompt, second: Prompt) -> Prompt:
        return f"{first} {second}"
