"""Beam search over any source of next tokens. The parameters mean the same as in vLLM."""

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import CONTEXT_LENGTH_EXCEEDED, RequestError
from shoal.outputs import BeamSearchOutput, BeamSearchSequence, FinishReason
from shoal.params import BeamSearchParams
from shoal.text.tokenizer import Tokenizer
from shoal.wire.base import Ids

# A function of sequences and a count. For each sequence it returns the `count` likeliest next tokens, or all tokens if
# `count` is -1, with their log-probabilities at temperature 1.
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
    """Return the best sequences of each prompt, in the order of the prompts.

    In each round, every live beam of every prompt is extended by its `2 * beam_width` likeliest tokens, in one batch.
    A beam whose new token is an end-of-text token is finished, unless `ignore_eos` is set. The `beam_width` likeliest
    of the others stay live. Finished beams, and beams that have reached the maximum length, are ranked by their score,
    which is log-probability / length ** length_penalty. As in vLLM, the length includes the prompt, but not the
    end-of-text token.

    Args:
        eos: the end-of-text tokens.
        max_model_len: the most tokens that a prompt and its output may have together.
        tokenizer: without it, the texts of the outputs are empty.

    Raises:
        RequestError: a prompt is empty, or leaves no room for an output.
    """
    searches = [_BeamSearch(tuple(prompt), params, frozenset(eos), max_model_len) for prompt in prompts]
    scale = params.temperature or 1.0
    # At another temperature, the probability of a token depends on the log-probabilities of all tokens.
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
    logprob: float  # of the output
    length: int  # for the score: without an end-of-text token
    finish: FinishReason = "length"

    def score(self, penalty: float) -> float:
        return _score(self.logprob, self.length, penalty)


class _BeamSearch:
    """The beam search for one prompt."""

    def __init__(self, prompt: Ids, params: BeamSearchParams, eos: frozenset[int], max_model_len: int) -> None:
        if not prompt:
            raise RequestError("beam search needs a prompt with at least one token", "prompt")
        if len(prompt) >= max_model_len:
            raise RequestError(
                f"a prompt of {len(prompt)} tokens leaves no room for an output: prompt and output may have "
                f"{max_model_len} tokens together",
                "prompt",
                CONTEXT_LENGTH_EXCEEDED,
            )
        self._prompt_len = len(prompt)
        self._last_len = min(len(prompt) + params.max_tokens, max_model_len)
        self._params = params
        self._eos = frozenset() if params.ignore_eos else eos
        self._done: list[_Beam] = []
        self.live = [_Beam(prompt, 0.0, len(prompt))]

    def extend(self, candidates: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Extend each live beam by its candidates, which are pairs of a token and its log-probability."""
        grown: list[_Beam] = []
        for beam, following in zip(self.live, candidates, strict=True):
            for token, logprob in following:
                tokens, total = (*beam.tokens, token), beam.logprob + logprob
                if token in self._eos:
                    self._done.append(_Beam(tokens, total, beam.length, "stop"))
                else:
                    grown.append(_Beam(tokens, total, beam.length + 1))
        # All have the same length, so the likeliest have the best score. `nlargest` keeps the order of equal ones.
        self.live = heapq.nlargest(self._params.beam_width, grown, key=lambda beam: beam.logprob)
        if self.live and len(self.live[0].tokens) == self._last_len:
            self._done += self.live
            self.live = []
        elif self._decided():
            self.live = []

    def _decided(self) -> bool:
        """Return True if no live beam can still be among the best.

        The log-probability of a beam only falls. So its best possible score is the one with its present
        log-probability at the greatest length if the penalty is positive, and at its present length otherwise.
        """
        if len(self._done) < self._params.beam_width or not self.live:
            return False
        penalty = self._params.length_penalty
        length = self._last_len if penalty > 0 else self.live[0].length
        worst = heapq.nlargest(self._params.beam_width, (beam.score(penalty) for beam in self._done))[-1]
        return _score(self.live[0].logprob, length, penalty) <= worst

    def best(self, tokenizer: Tokenizer | None) -> list[BeamSearchSequence]:
        """Return the finished beams with the best scores, the best first."""
        penalty = self._params.length_penalty
        found = heapq.nlargest(self._params.beam_width, self._done, key=lambda beam: beam.score(penalty))
        return [
            BeamSearchSequence(beam.tokens, self._text(beam, tokenizer), beam.logprob, beam.finish) for beam in found
        ]

    def _text(self, beam: _Beam, tokenizer: Tokenizer | None) -> str:
        """Return the text of the output, without the token that ended it."""
        if tokenizer is None:
            return ""
        stream = tokenizer.stream(beam.tokens[: self._prompt_len])
        output = beam.tokens[self._prompt_len : -1 if beam.finish == "stop" else None]
        return "".join([stream.push(token) for token in output]) + stream.flush()


def _score(logprob: float, length: int, penalty: float) -> float:
    return logprob / math.pow(length, penalty)


def _candidates(logprobs: Mapping[int, float], count: int, temperature: float) -> list[tuple[int, float]]:
    """Return the `count` likeliest tokens with their log-probabilities at this temperature.

    Tokens that are impossible are left out.
    """
    possible = [(token, logprob) for token, logprob in logprobs.items() if logprob > -math.inf]
    likeliest = heapq.nlargest(count, possible, key=lambda each: each[1])
    if temperature == 1:
        return likeliest
    peak = max((logprob for _, logprob in possible), default=0.0)
    total = math.log(sum(math.exp((logprob - peak) / temperature) for _, logprob in possible))
    return [(token, (logprob - peak) / temperature - total) for token, logprob in likeliest]
