"""Speculative decoding (Leviathan et al., ICML 2023): drafts of the next tokens, checked by the model in one step.

A rank draws the token after every draft as it would have drawn it anyway, from the same seed and position, and keeps
drafts up to the first that differs from the drawn token. So outputs have the same tokens as without drafts, greedy or
sampled. A wrong draft costs only its computation.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.config.option_forms import SpeculativeConfig
from shoal.engine.ngram import NgramIndex
from shoal.wire.base import Ids


class Drafter(Protocol):
    """A source of drafts for one request."""

    lookahead: int  # positions after the planned tokens for which ranks need room in the KV cache

    def accept(self, tokens: Sequence[int], drafts: Ids) -> None:
        """Take in new known tokens (the prompt at first), and the draft model's drafts of the tokens after them."""

    def propose(self, count: int) -> Ids:
        """Return up to `count` drafts of the tokens after the known ones."""


class NgramDrafter:
    """Proposes the tokens that followed when the last tokens occurred before in the text."""

    lookahead = 0

    def __init__(self, config: SpeculativeConfig) -> None:
        self._max_drafts = config.num_speculative_tokens
        self._index = NgramIndex(config.prompt_lookup_max, config.prompt_lookup_min)
        self._not_indexed: list[int] = []  # indexed at the first `propose`: a waiting request needs no index

    def accept(self, tokens: Sequence[int], drafts: Ids) -> None:
        self._not_indexed += tokens

    def propose(self, count: int) -> Ids:
        self._index.extend(self._not_indexed)
        self._not_indexed.clear()
        return self._index.propose(min(count, self._max_drafts))


class ModelDrafter:
    """Proposes the drafts of the draft model, which runs on the ranks after every step."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self.lookahead = config.num_speculative_tokens
        self._drafts: Ids = ()

    def accept(self, tokens: Sequence[int], drafts: Ids) -> None:
        self._drafts = drafts

    def propose(self, count: int) -> Ids:
        return self._drafts[:count]


def make_drafters(config: SpeculativeConfig | None) -> Callable[[], Drafter | None]:
    """Return a function that makes the drafter of a request, or returns None without speculative decoding."""
    if config is None:
        return lambda: None
    return lambda: NgramDrafter(config) if config.method == "ngram" else ModelDrafter(config)
