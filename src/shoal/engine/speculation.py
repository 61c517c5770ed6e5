"""Speculative decoding (Leviathan et al., ICML 2023): guesses at the next tokens, checked by the model in one step.

A rank draws the token behind every guess as it would have drawn it anyway, from the same seed and position, and keeps
as many guesses as are equal to what was drawn. So outputs are the same tokens as without guesses, greedy or sampled;
a wrong guess costs its computation and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.config.engine_options import SpeculativeConfig
from shoal.engine.ngram import NgramIndex
from shoal.wire.base import Ids


class Guesser(Protocol):
    """Guesses for one request."""

    lookahead: int  # tokens beyond the planned ones for which ranks want room in the cache

    def accept(self, tokens: Sequence[int], guesses: Ids) -> None:
        """Tokens that are known now (the prompt's first), and what the ranks guess to follow them."""

    def guess(self, count: int) -> Ids:
        """Up to `count` tokens."""


class NgramGuesser:
    """What followed the last tokens when the text had them before."""

    lookahead = 0

    def __init__(self, config: SpeculativeConfig) -> None:
        self._most = config.num_speculative_tokens
        self._index = NgramIndex(config.prompt_lookup_max, config.prompt_lookup_min)
        self._unread: list[int] = []  # a request that waits has a text, and no index of it yet

    def accept(self, tokens: Sequence[int], guesses: Ids) -> None:
        self._unread += tokens

    def guess(self, count: int) -> Ids:
        self._index.extend(self._unread)
        self._unread.clear()
        return self._index.propose(min(count, self._most))


class ModelGuesser:
    """What the draft model said, which runs on the ranks behind every step."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self.lookahead = config.num_speculative_tokens
        self._guesses: Ids = ()

    def accept(self, tokens: Sequence[int], guesses: Ids) -> None:
        self._guesses = guesses

    def guess(self, count: int) -> Ids:
        return self._guesses[:count]


def make_guessers(config: SpeculativeConfig | None) -> Callable[[], Guesser | None]:
    """A maker of guessers, one for each request."""
    if config is None:
        return lambda: None
    return lambda: NgramGuesser(config) if config.method == "ngram" else ModelGuesser(config)
