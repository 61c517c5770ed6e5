"""The results that a user gets: outputs, their tokens and log-probabilities. This module is free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability. Its rank among all tokens, from 1 on, and its text are None if they are not known.

    `token_bytes`: the bytes that the token adds to the text, if these are not `decoded_token` in UTF-8. For a token
    that is a part of a character they are that part; for a token that is not in the text (end of text) they are b"".
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
    token_bytes: bytes | None = None


Logprobs = Mapping[int, Logprob]  # the log-probabilities at one position, by token id


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    cumulative_logprob: float | None = None
    logprobs: Sequence[Logprobs] | None = None  # one per token
    # The text of `stop` or the token of `stop_token_ids` that ended the output. None for an end-of-text token, unless
    # `stop_token_ids` has that token too.
    stop_reason: int | str | None = None
    text_offsets: tuple[int, ...] | None = None  # with `logprobs`: the offset in `text` at which each token begins


@dataclass(frozen=True, slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int = 0
    error: str | None = None  # why the request has no complete output
    finished: bool = True
    prompt_logprobs: Sequence[Logprobs | None] | None = None  # one per prompt token, None for the first


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    tokens: tuple[int, ...]  # prompt and output
    text: str  # of the output
    cum_logprob: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    sequences: tuple[BeamSearchSequence, ...]  # the best first
