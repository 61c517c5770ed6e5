"""Speculative decoding (Leviathan et al., ICML 2023): drafts of the next tokens, checked by the model in one step.

A rank draws the token behind every draft as it would have drawn it anyway, from the same seed and position, and keeps
drafts as long as they are equal to what was drawn. So outputs have the same tokens as without drafts, greedy or
sampled; a wrong draft costs its computation and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from shoal.config.option_forms import SpeculativeConfig
from shoal.engine.ngram import NgramIndex
from shoal.wire.base import Ids


class Drafter(Protocol):
    """A source of drafts for one request."""

    lookahead: int  # positions beyond the planned tokens for which ranks want room in the KV cache

    def accept(self, tokens: Sequence[int], drafts: Ids) -> None:
        """Take in tokens that are known now, the prompt's first, and the draft model's drafts behind them."""

    def propose(self, count: int) -> Ids:
        """Return up to `count` drafts of what follows the known tokens."""


class NgramDrafter:
    """Proposes what followed the last tokens when the text had them before."""

    lookahead = 0

    def __init__(self, config: SpeculativeConfig) -> None:
        self._most = config.num_speculative_tokens
        self._index = NgramIndex(config.prompt_lookup_max, config.prompt_lookup_min)
        self._not_indexed: list[int] = []  # a request that only waits needs no index

    def accept(self, tokens: Sequence[int], drafts: Ids) -> None:
        self._not_indexed += tokens

    def propose(self, count: int) -> Ids:
        self._index.extend(self._not_indexed)
        self._not_indexed.clear()
        return self._index.propose(min(count, self._most))


class ModelDrafter:
    """Proposes what the draft model said, which runs on the ranks behind every step."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self.lookahead = config.num_speculative_tokens
        self._drafts: Ids = ()

    def accept(self, tokens: Sequence[int], drafts: Ids) -> None:
        self._drafts = drafts

    def propose(self, count: int) -> Ids:
        return self._drafts[:count]


def make_drafters(config: SpeculativeConfig | None) -> Callable[[], Drafter | None]:
    """Return a function that makes the drafter of a request; None without speculative decoding."""
    if config is None:
        return lambda: None
    return lambda: NgramDrafter(config) if config.method == "ngram" else ModelDrafter(config)
