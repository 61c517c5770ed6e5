"""What a user gets back: outputs, their tokens and log-probabilities. Free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability; its rank among all tokens, from 1, and its text, where they are known.

    `token_bytes`: what it adds to an output's text, where that is not `decoded_token` in UTF-8: of a token that is part
    of a character, that part; of one that is left out of the text, as an end-of-text token is, b"".
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None
    token_bytes: bytes | None = None


Logprobs = Mapping[int, Logprob]  # token id -> what is known of it, at one position


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    cumulative_logprob: float | None = None
    logprobs: Sequence[Logprobs] | None = None  # one a token
    # The text of `stop` or the token of `stop_token_ids` that ended it. None for an end-of-text token, unless
    # `stop_token_ids` names that one too.
    stop_reason: int | str | None = None
    text_offsets: tuple[int, ...] | None = None  # with `logprobs`: where in `text` each token begins


@dataclass(frozen=True, slots=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int = 0
    error: str | None = None  # why the request has no complete output
    finished: bool = True
    prompt_logprobs: Sequence[Logprobs | None] | None = None  # one a prompt token, None for the first


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    tokens: tuple[int, ...]  # prompt and output
    text: str  # of the output
    cum_logprob: float
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    sequences: tuple[BeamSearchSequence, ...]  # the best first
