"""Beam search, with vLLM's meaning of its parameters, over any source of next tokens."""

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import RequestError
from shoal.outputs import BeamSearchOutput, BeamSearchSequence, FinishReason
from shoal.params import BeamSearchParams
from shoal.text.tokenizer import Tokenizer
from shoal.wire.base import Ids

# (sequences, count) -> for each the `count` likeliest next tokens with their log-probabilities at temperature 1; or
# all tokens, if `count` is -1.
NextTokens = Callable[[Sequence[Ids], int], Sequence[Mapping[int, float]]]

_ALL = -1


def beam_search(
    next_tokens: NextTokens,
    prompts: Sequence[Ids],
    params: BeamSearchParams,
    *,
    eos: Collection[int],
    max_model_len: int,
    tokenizer: Tokenizer | None,
) -> list[BeamSearchOutput]:
    """The best sequences of each prompt, in the order of the prompts.

    In each round every live beam of every prompt is extended by its `2 * beam_width` likeliest tokens, in one batch.
    An end-of-text token finishes a beam, unless `ignore_eos`; of the rest the `beam_width` likeliest live on. The
    score by which finished beams and those at the end of their length are ranked is log-probability over
    length ** length_penalty, where the length counts the prompt, and not the end-of-text token, as in vLLM.

    Without a tokenizer texts are empty.

    Raises:
        RequestError: a prompt is empty, or fills the model's length.
    """
    searches = [_BeamSearch(tuple(prompt), params, frozenset(eos), max_model_len) for prompt in prompts]
    scale = params.temperature or 1.0
    # The probabilities at another temperature are a matter of all tokens.
    count = 2 * params.beam_width if scale == 1 else _ALL
    while running := [search for search in searches if search.live]:
        batch = [beam.tokens for search in running for beam in search.live]
        found = iter(next_tokens(batch, count))
        for search in running:
            search.extend([_candidates(next(found), 2 * params.beam_width, scale) for _ in search.live])
    return [BeamSearchOutput(tuple(search.best(tokenizer))) for search in searches]


@dataclass(frozen=True, slots=True)
class _Beam:
    tokens: Ids  # prompt and output
    logprob: float
    length: int  # for the score
    finish: FinishReason = "length"

    def score(self, penalty: float) -> float:
        return _score(self.logprob, self.length, penalty)


class _BeamSearch:
    """Of one prompt."""

    def __init__(self, prompt: Ids, params: BeamSearchParams, eos: frozenset[int], max_model_len: int) -> None:
        if not prompt:
            raise RequestError("beam search needs a prompt of at least one token")
        if len(prompt) >= max_model_len:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens leaves no room for an output: the model's length is {max_model_len}"
            )
        self._prompt_len = len(prompt)
        self._last_len = min(len(prompt) + params.max_tokens, max_model_len)
        self._params = params
        self._eos = frozenset() if params.ignore_eos else eos
        self._done: list[_Beam] = []
        self.live = [_Beam(prompt, 0.0, len(prompt))]

    def extend(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> None:
        """By what may follow each live beam: (token, log-probability)."""
        grown: list[_Beam] = []
        for beam, following in zip(self.live, candidates, strict=True):
            for token, logprob in following:
                tokens, total = (*beam.tokens, token), beam.logprob + logprob
                if token in self._eos:
                    self._done.append(_Beam(tokens, total, beam.length, "stop"))
                else:
                    grown.append(_Beam(tokens, total, beam.length + 1))
        # All have one length, so the likeliest are the best. Equal ones stay in their order.
        self.live = heapq.nlargest(self._params.beam_width, grown, key=lambda beam: beam.logprob)
        if self.live and len(self.live[0].tokens) == self._last_len:
            self._done += self.live
            self.live = []
        elif self._decided():
            self.live = []

    def _decided(self) -> bool:
        """Can no live beam come among the best any more? Its log-probability only falls; with a penalty above 0 the
        score is highest at the greatest length, otherwise at the least."""
        if len(self._done) < self._params.beam_width or not self.live:
            return False
        penalty = self._params.length_penalty
        length = self._last_len if penalty > 0 else self.live[0].length
        worst = heapq.nlargest(self._params.beam_width, (beam.score(penalty) for beam in self._done))[-1]
        return _score(self.live[0].logprob, length, penalty) <= worst

    def best(self, tokenizer: Tokenizer | None) -> list[BeamSearchSequence]:
        penalty = self._params.length_penalty
        found = heapq.nlargest(self._params.beam_width, self._done, key=lambda beam: beam.score(penalty))
        return [
            BeamSearchSequence(beam.tokens, self._text(beam, tokenizer), beam.logprob, beam.finish) for beam in found
        ]

    def _text(self, beam: _Beam, tokenizer: Tokenizer | None) -> str:
        """Of the output, without the token that ended it."""
        if tokenizer is None:
            return ""
        stream = tokenizer.stream(beam.tokens[: self._prompt_len])
        output = beam.tokens[self._prompt_len : -1 if beam.finish == "stop" else None]
        return "".join([stream.push(token) for token in output]) + stream.flush()


def _score(logprob: float, length: int, penalty: float) -> float:
    return logprob / math.pow(length, penalty)


def _candidates(logprobs: Mapping[int, float], count: int, temperature: float) -> list[tuple[int, float]]:
    """The `count` likeliest of the tokens, those that are impossible left out."""
    possible = [(token, logprob) for token, logprob in logprobs.items() if logprob > -math.inf]
    likeliest = heapq.nlargest(count, possible, key=lambda each: each[1])
    if temperature == 1:
        return likeliest
    peak = max((logprob for _, logprob in possible), default=0.0)
    total = math.log(sum(math.exp((logprob - peak) / temperature) for _, logprob in possible))
    return [(token, (logprob - peak) / temperature - total) for token, logprob in likeliest]
