"""Outputs in the forms of OpenAI's answers: choices, log-probabilities, usage.

Log-probabilities are long lists of small objects. `make_list` says what they are gathered in: something that encodes
each item as it comes holds texts instead of those objects.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, TypeVar

from shoal.outputs import CompletionOutput, Logprob, Logprobs
from shoal.text.token_offsets import is_complete_text

_LEAST = -9999.0  # JSON has no infinity; OpenAI's API writes this for a token that can't be


class Gathered(Protocol):
    def append(self, item: Any, /) -> None: ...


MakeList = Callable[[], Gathered]
List = TypeVar("List", bound=Gathered)


def chat_choice(
    output: CompletionOutput, top: int | None, *, by_id: bool = False, make_list: MakeList = list
) -> dict[str, Any]:
    """`top`, `by_id`: as `chat_logprobs` has them; of no effect where none were asked for."""
    told = None
    if output.logprobs is not None:
        told = {"content": chat_logprobs(output.token_ids, output.logprobs, top or 0, by_id=by_id, into=make_list())}
    return {
        "index": output.index,
        "message": {"role": "assistant", "content": output.text},
        "logprobs": told,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def completion_choice(output: CompletionOutput, *, by_id: bool = False, make_list: MakeList = list) -> dict[str, Any]:
    told = None
    if output.logprobs is not None:
        told = completion_logprobs(
            output.token_ids, output.logprobs, output.text_offsets, by_id=by_id, make_list=make_list
        )
    return {
        "index": output.index,
        "text": output.text,
        "logprobs": told,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_logprobs(
    tokens: Sequence[int], logprobs: Sequence[Logprobs], top: int, into: List, *, by_id: bool = False
) -> List:
    """`into`, with the `top` likeliest tokens of each position, in that order; all that are known where it is -1. The
    token itself is among them only if it is one of the likeliest. `by_id`: tokens are called `token_id:17`."""
    for token, each in zip(tokens, logprobs, strict=False):
        into.append(_position(token, each, top, by_id=by_id))
    return into


def completion_logprobs(
    tokens: Iterable[int],
    logprobs: Iterable[Logprobs | None],
    offsets: Sequence[int] | None,
    *,
    first: str = "",
    by_id: bool = False,
    make_list: MakeList = list,
) -> dict[str, Any]:
    """Four lists over positions.

    Args:
        offsets: where the tokens begin in the text. None: nobody knows, and each is as long as it reads.
        first: how a token reads of which nothing is known, which is a prompt's first.
        by_id: tokens are called `token_id:17`.
    """
    names: list[str] = []
    texts: list[str] = []
    own: list[float | None] = []
    likeliest = make_list()
    for token, each in zip(tokens, logprobs, strict=False):
        texts.append(first if each is None else _legacy_name(token, each[token]))
        names.append(_id_text(token) if by_id else texts[-1])
        own.append(None if each is None else finite(each[token].logprob))
        likeliest.append(None if each is None else _likeliest(each, by_id=by_id))
    if offsets is None:
        offsets = list(accumulate(map(len, texts), initial=0))
    return {
        "text_offset": list(offsets[: len(texts)]),
        "tokens": names,
        "token_logprobs": own,
        "top_logprobs": likeliest,
    }


def positions(logprobs: Iterable[Logprobs | None], into: List) -> List:
    """`into`, with token id -> what is known of the token, for each position."""
    for each in logprobs:
        into.append(None if each is None else {str(token): _known(found) for token, found in each.items()})
    return into


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST


def _known(found: Logprob) -> dict[str, Any]:
    return {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}


def _likeliest(each: Logprobs, *, by_id: bool) -> Mapping[str, float]:
    """By text. Tokens that read the same are one entry, the likeliest's."""
    found: dict[str, float] = {}
    for token, known in each.items():
        text = _id_text(token) if by_id else _legacy_name(token, known)
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
    text, own = _text(token, known), known.token_bytes
    name = text if own is None or is_complete_text(own) else spelled(own)
    return {
        "token": _id_text(token) if by_id else name,
        "logprob": finite(known.logprob),
        "bytes": list(text.encode("utf-8", "replace") if own is None else own),
    }


def spelled(own: bytes) -> str:
    """A part of a character as OpenAI's API shows it: \\xe4\\xb8."""
    return own.decode("utf-8", "backslashreplace")


def legacy_name(text: str, own: bytes | None) -> str:
    """How the older API calls a token: as it reads, or bytes:\\xe4\\xb8."""
    return text if own is None or is_complete_text(own) else f"bytes:{spelled(own)}"


def _legacy_name(token: int, known: Logprob) -> str:
    return legacy_name(_text(token, known), known.token_bytes)


def _text(token: int, known: Logprob) -> str:
    return known.decoded_token if known.decoded_token is not None else _id_text(token)


def _id_text(token: int) -> str:
    return f"token_id:{token}"
