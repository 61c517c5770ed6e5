"""Outputs in the forms of OpenAI's answers: choices, log-probabilities, usage.

Log-probabilities are long lists of small objects. A caller may pass another kind of list (`make_list`, `into`), for
example one that encodes each item as it comes and keeps only the text.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol, TypeVar

from shoal.outputs import CompletionOutput, Logprob, Logprobs
from shoal.text.token_offsets import is_complete_text

_MINUS_INFINITY = -9999.0  # what OpenAI's API writes for a token that can't occur; JSON has no infinity


class ItemList(Protocol):
    """A list to which items can be added."""

    def append(self, item: Any, /) -> None: ...


MakeList = Callable[[], ItemList]
List = TypeVar("List", bound=ItemList)


def chat_choice(
    output: CompletionOutput, top: int | None, *, by_id: bool = False, make_list: MakeList = list
) -> dict[str, Any]:
    """Return a choice of a chat. `top` and `by_id` are as for `chat_logprobs`, if the output has log-probabilities."""
    logprobs = None
    if output.logprobs is not None:
        content = chat_logprobs(output.token_ids, output.logprobs, top or 0, by_id=by_id, into=make_list())
        logprobs = {"content": content}
    return {
        "index": output.index,
        "message": {"role": "assistant", "content": output.text},
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def completion_choice(output: CompletionOutput, *, by_id: bool = False, make_list: MakeList = list) -> dict[str, Any]:
    """Return a choice of a completion. `by_id` is as for `completion_logprobs`."""
    logprobs = None
    if output.logprobs is not None:
        logprobs = completion_logprobs(
            output.token_ids, output.logprobs, output.text_offsets, by_id=by_id, make_list=make_list
        )
    return {
        "index": output.index,
        "text": output.text,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Return the usage of a request. The arguments are numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def chat_logprobs(
    tokens: Sequence[int], logprobs: Sequence[Logprobs], top: int, into: List, *, by_id: bool = False
) -> List:
    """Add the log-probabilities of tokens to a list, in the form of chats, and return the list.

    Args:
        top: how many of the likeliest tokens are listed for each token; -1: all that are known. The token itself is
            listed only if it is one of them.
        by_id: tokens are named like `token_id:17`.
    """
    for token, each in zip(tokens, logprobs, strict=False):
        into.append(_chat_item(token, each, top, by_id=by_id))
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
    """Return the log-probabilities of tokens in the form of completions: four lists with an item for each token.

    Args:
        offsets: where the tokens begin in the text; None: each token is taken to be as long as its text.
        first: the text of a token of which nothing is known, which is the first one of a prompt.
        by_id: tokens are named like `token_id:17`.
    """
    names: list[str] = []
    texts: list[str] = []
    own: list[float | None] = []
    likeliest = make_list()
    for token, each in zip(tokens, logprobs, strict=False):
        texts.append(first if each is None else _legacy_name(token, each[token]))
        names.append(_id_name(token) if by_id else texts[-1])
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


def logprobs_by_id(logprobs: Iterable[Logprobs | None], into: List) -> List:
    """Add log-probabilities to a list, each as an object with token ids as keys (vLLM's form), and return the list."""
    for each in logprobs:
        into.append(None if each is None else {str(token): _described(found) for token, found in each.items()})
    return into


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _MINUS_INFINITY


def _described(found: Logprob) -> dict[str, Any]:
    return {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}


def _likeliest(each: Logprobs, *, by_id: bool) -> Mapping[str, float]:
    """Return log-probabilities by the names of tokens. Of tokens with the same name, the likeliest counts."""
    found: dict[str, float] = {}
    for token, known in each.items():
        name = _id_name(token) if by_id else _legacy_name(token, known)
        found[name] = max(finite(known.logprob), found.get(name, -math.inf))
    return found


def _chat_item(token: int, each: Logprobs, top: int, *, by_id: bool) -> dict[str, Any]:
    likeliest = sorted(each.items(), key=lambda pair: _rank(pair[1]))[: len(each) if top < 0 else top]
    return {
        **_chat_token(token, each[token], by_id=by_id),
        "top_logprobs": [_chat_token(*pair, by_id=by_id) for pair in likeliest],
    }


def _rank(known: Logprob) -> float:
    return math.inf if known.rank is None else known.rank


def _chat_token(token: int, known: Logprob, *, by_id: bool) -> dict[str, Any]:
    text, own = _text(token, known), known.token_bytes
    name = text if own is None or is_complete_text(own) else escaped(own)
    return {
        "token": _id_name(token) if by_id else name,
        "logprob": finite(known.logprob),
        "bytes": list(text.encode("utf-8", "replace") if own is None else own),
    }


def escaped(own: bytes) -> str:
    r"""Return the bytes of a part of a character as OpenAI's API shows them: \xe4\xb8."""
    return own.decode("utf-8", "backslashreplace")


def legacy_name(text: str, own: bytes | None) -> str:
    r"""Return the name of a token in completions: its text, or bytes:\xe4\xb8 for a part of a character."""
    return text if own is None or is_complete_text(own) else f"bytes:{escaped(own)}"


def _legacy_name(token: int, known: Logprob) -> str:
    return legacy_name(_text(token, known), known.token_bytes)


def _text(token: int, known: Logprob) -> str:
    return known.decoded_token if known.decoded_token is not None else _id_name(token)


def _id_name(token: int) -> str:
    return f"token_id:{token}"
