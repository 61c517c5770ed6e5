"""Prompts with a given number of tokens."""

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
_FIRST_SAFE_ID = 4  # ids below are often special tokens, such as those for the beginning and end of a text


class Prompts(Protocol):
    def make(self, tokens: int, draw: random.Random, *, joined: bool = False) -> Prompt:
        """Return a prompt of `tokens` tokens. `joined`: it will be joined to the end of another."""
        ...

    def join(self, first: Prompt, second: Prompt) -> Prompt: ...


class IdPrompts:
    """Makes prompts of random token ids below `vocab_size`."""

    def __init__(self, vocab_size: int) -> None:
        self._ids = range(min(_FIRST_SAFE_ID, vocab_size - 1), vocab_size)

    def make(self, tokens: int, draw: random.Random, *, joined: bool = False) -> Prompt:
        return draw.choices(self._ids, k=tokens)

    def join(self, first: Prompt, second: Prompt) -> Prompt:
        return [*first, *second]


class WordPrompts:
    """Makes texts of random words.

    `costs`: tokens that each word adds to a text. `starts`: tokens of a text of one word, if these numbers differ.
    """

    def __init__(self, costs: Mapping[str, float], starts: Mapping[str, float] | None = None) -> None:
        self._costs = costs
        self._starts = costs if starts is None else starts
        self._words = list(costs)
        self._max_cost = max(costs.values())

    def make(self, tokens: int, draw: random.Random, *, joined: bool = False) -> Prompt:
        """Return a text of about `tokens` tokens; the shortest word if none fits."""
        words: list[str] = []
        left = float(tokens)
        costs = self._costs if joined else self._starts
        while fitting := [word for word, cost in costs.items() if cost <= left]:
            words.append(draw.choice(fitting))
            left -= costs[words[-1]]
            costs = self._costs
            while left >= self._max_cost:
                words.append(draw.choice(self._words))
                left -= costs[words[-1]]
        return " ".join(words) or min(costs, key=costs.__getitem__)

    def join(self, first: Prompt, second: Prompt) -> Prompt:
        return f"{first} {second}"
