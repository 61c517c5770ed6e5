"""Outputs in the forms of OpenAI's answers: choices, log-probabilities, usage."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from shoal.types import CompletionOutput, Logprob, Logprobs

_LEAST = -9999.0  # JSON has no infinity; OpenAI's API writes this for a token that can't be


def chat_choice(output: CompletionOutput, top: int | None, *, by_id: bool = False) -> dict[str, Any]:
    """`top`, `by_id`: as `chat_logprobs` has them; of no effect where none were asked for."""
    wanted = output.logprobs
    return {
        "index": output.index,
        "message": {"role": "assistant", "content": output.text},
        "logprobs": None if wanted is None else chat_logprobs(output.token_ids, wanted, top or 0, by_id=by_id),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def completion_choice(output: CompletionOutput, *, by_id: bool = False) -> dict[str, Any]:
    wanted = output.logprobs
    return {
        "index": output.index,
        "text": output.text,
        "logprobs": None if wanted is None else completion_logprobs(output.token_ids, wanted, by_id=by_id),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_logprobs(
    tokens: Sequence[int], logprobs: Sequence[Logprobs], top: int, *, by_id: bool = False
) -> dict[str, Any]:
    """The `top` likeliest tokens of each position, in that order; all that are known where it is -1. The token itself
    is among them only if it is one of the likeliest. `by_id`: tokens are called `token_id:17`."""
    return {"content": [_position(*pair, top, by_id=by_id) for pair in zip(tokens, logprobs, strict=False)]}


def completion_logprobs(
    tokens: Sequence[int],
    logprobs: Sequence[Logprobs | None],
    *,
    first: str = "",
    offset: int = 0,
    by_id: bool = False,
) -> dict[str, Any]:
    """Four lists over positions. `first`: the text of a token of which nothing is known, which is a prompt's first;
    `offset`: how many characters stand before these tokens; `by_id`: tokens are called `token_id:17`."""
    known = list(zip(tokens, logprobs, strict=False))
    texts = [first if each is None else _text(token, each[token]) for token, each in known]
    return {
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=offset)) if texts else [],
        "tokens": [_id_text(token) for token, _ in known] if by_id else texts,
        "token_logprobs": [None if each is None else finite(each[token].logprob) for token, each in known],
        "top_logprobs": [None if each is None else _likeliest(each, by_id=by_id) for _, each in known],
    }


def positions(logprobs: Sequence[Logprobs | None]) -> list[dict[str, Any] | None]:
    """A list over positions of token id -> what is known of the token."""
    return [None if each is None else {str(token): _known(found) for token, found in each.items()} for each in logprobs]


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST


def _known(found: Logprob) -> dict[str, Any]:
    return {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}


def _likeliest(each: Logprobs, *, by_id: bool) -> Mapping[str, float]:
    """By text. Tokens that read the same, such as halves of a character, are one entry, the likeliest's."""
    found: dict[str, float] = {}
    for token, known in each.items():
        text = _id_text(token) if by_id else _text(token, known)
        found[text] = max(finite(known.logprob), found.get(text, -math.inf))
    return found


def _position(token: int, each: Logprobs, top: int, *, by_id: bool) -> dict[str, Any]:
    likeliest = sorted(each.items(), key=lambda pair: _rank(pair[1]))[: len(each) if top < 0 else top]
    return {
        **_token(token, each[token], by_id=by_id),
        "top_logprobs": [_token(*pair, by_id=by_id) for pair in likeliest],
    }


def _rank(known: Logprob) -> float:
    return math.inf if known.rank is None else known.rank


def _token(token: int, known: Logprob, *, by_id: bool) -> dict[str, Any]:
    text = _text(token, known)
    return {
        "token": _id_text(token) if by_id else text,
        "logprob": finite(known.logprob),
        "bytes": list(text.encode("utf-8", "replace")),
    }


def _text(token: int, known: Logprob) -> str:
    return known.decoded_token if known.decoded_token is not None else _id_text(token)


def _id_text(token: int) -> str:
    return f"token_id:{token}"
