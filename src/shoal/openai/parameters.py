"""Sampling parameters from the body of an OpenAI request.

Keys are those of OpenAI's API reference, "Completions" and "Chat", with vLLM's additions.
"""

from collections.abc import Collection, Mapping
from typing import Any

from shoal.errors import RequestError
from shoal.params import SamplingParams
from shoal.values import shown

COMPLETION_TOKENS = 16  # what OpenAI's completions give where nobody says max_tokens
# Named as in SamplingParams, vLLM's additions included.
_SAME = [
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids", "ignore_eos", "min_tokens",
    "skip_special_tokens", "include_stop_str_in_output", "prompt_logprobs", "structured_outputs",
    "truncate_prompt_tokens",
]  # fmt: skip
_WITHOUT_EFFECT = [
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "stream_options", "parallel_tool_calls",
]  # fmt: skip
_READ = [
    "prompt", "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "response_format",
    "cache_salt",
]  # fmt: skip
_SERVED: dict[str, object] = {"modalities": ["text"], "include_reasoning": True, "spaces_between_special_tokens": True}
_OFF: tuple[object, ...] = (None, False, [], {}, "", "none")
# vLLM's older names for structured outputs.
GUIDED = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
}  # fmt: skip


def defaults(*, chat: bool) -> SamplingParams:
    """What holds where neither the request nor a flag nor the model says anything."""
    return SamplingParams(max_tokens=None if chat else COMPLETION_TOKENS)


def read_sampling(
    body: Mapping[str, Any], *, chat: bool, read: Collection[str] = (), inside: str = ""
) -> dict[str, Any]:
    """Return the sampling parameters of a body, by the names of `SamplingParams`. A null is like a missing field.

    Args:
        read: fields of the body that the caller reads itself.
        inside: stands before the names of fields in errors, such as "body.".

    Raises:
        RequestError: a field is not supported, or its value has the wrong form. `SamplingParams` checks the ranges.
    """
    for name, value in body.items():
        known = name in _SAME or name in _WITHOUT_EFFECT or name in _READ or name in GUIDED or name in read
        if not known and value not in _OFF and value != _SERVED.get(name):
            raise _field_error(inside, name, "is not supported; leave it out")
    found = {name: body[name] for name in _SAME if body.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):  # if both are given, the newer name counts
        if body.get(name) is not None:
            found["max_tokens"] = body[name]
    found |= _logprobs(body, chat=chat, inside=inside)
    return found | _structured(body, inside)


def _logprobs(body: Mapping[str, Any], *, chat: bool, inside: str) -> dict[str, Any]:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if not chat:
        return {} if wanted is None else {"logprobs": wanted}
    if wanted is not None and not isinstance(wanted, bool):
        raise _field_error(
            inside, "logprobs", f"must be true or false, got {wanted!r}; `top_logprobs` says how many are wanted"
        )
    if not wanted and top:
        raise _field_error(inside, "top_logprobs", "needs `logprobs` to be true")
    return {"logprobs": top or 0} if wanted else {}


def _structured(body: Mapping[str, Any], inside: str) -> dict[str, Any]:
    """Return the structured output that a body asks for. It has several ways to ask, of which it may use one."""
    given = {name: {kind: body[name]} for name, kind in GUIDED.items() if body.get(name) is not None}
    if body.get("response_format") is not None:
        wanted = read_response_format(body["response_format"], f"{inside}response_format")
        given |= {} if wanted is None else {"response_format": wanted}
    if body.get("structured_outputs") is not None:
        given["structured_outputs"] = body["structured_outputs"]
    if len(given) > 1:
        names = list(given)
        raise RequestError(f"`{inside}{'` and `'.join(names)}` don't go together: give one of them", inside + names[0])
    return {"structured_outputs": next(iter(given.values()))} if given else {}


def _strict(described: object, where: str) -> dict[str, bool]:
    """Return the field `strict` of `structured_outputs`, if a schema asks for it.

    Raises:
        RequestError: the value is neither true nor false.
    """
    strict = described.get("strict") if isinstance(described, Mapping) else None
    if strict is not None and not isinstance(strict, bool):
        raise _field_error(where, ".strict", f"must be true or false, got {shown(strict)}")
    return {"strict": True} if strict else {}


def read_response_format(wanted: object, where: str) -> dict[str, Any] | None:
    """Return a `response_format` in the form of `structured_outputs`; None if any text is allowed.

    Args:
        where: the name of the field in errors.

    Raises:
        RequestError: it is not a response format.
    """
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if isinstance(wanted, dict) and kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise _field_error(where, ".json_schema.schema", "must be a JSON schema")
        return {"json": schema, **_strict(described, f"{where}.json_schema")}
    raise _field_error(where, ".type", f"must be text, json_object or json_schema, got {kind!r}")


def _field_error(inside: str, name: str, problem: str) -> RequestError:
    """Return an error that names a field of the body."""
    return RequestError.about(inside + name, problem, subject=f"`{inside}{name}`")
