"""Sampling parameters in the bodies of OpenAI's requests.

The fields are those of OpenAI's API reference, "Completions" and "Chat", and vLLM's additions to them.
"""

from collections.abc import Collection, Mapping
from typing import Any

from shoal.errors import RequestError
from shoal.params import SAMPLING_TABLE, SamplingParams
from shoal.values import shown

COMPLETION_TOKENS = 16  # max_tokens of OpenAI's completions, if a request does not have it
# Fields that have the name of their parameter in all requests that have them.
_SAME_NAME = [name for name, row in SAMPLING_TABLE.items() if row.http and set(row.http.values()) == {name}]
_WITHOUT_EFFECT = [
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "stream_options", "parallel_tool_calls",
]  # fmt: skip
_READ_BELOW = [
    "prompt", "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "response_format",
    "cache_salt", "vllm_xargs",
]  # fmt: skip
# Values of fields that are not supported, but that ask for nothing else than what Shoal does.
_AS_SERVED: dict[str, object] = {"modalities": ["text"], "include_reasoning": True}
_OFF: tuple[object, ...] = (None, False, [], {}, "", "none")
# vLLM's older names for structured outputs.
GUIDED = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar",
}  # fmt: skip


def defaults(*, chat: bool) -> SamplingParams:
    """Return the parameters where neither a request nor a flag nor the model says anything."""
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
        known = name in _SAME_NAME or name in _WITHOUT_EFFECT or name in _READ_BELOW or name in GUIDED or name in read
        if not known and value not in _OFF and value != _AS_SERVED.get(name):
            raise _field_error(inside, name, "is not supported; leave it out")
    _check_extra_args(body.get("vllm_xargs"), inside)
    found = {name: body[name] for name in _SAME_NAME if body.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):  # if both are given, the newer name counts
        if body.get(name) is not None:
            found["max_tokens"] = body[name]
    found |= _logprobs(body, chat=chat, inside=inside)
    return found | _structured(body, inside)


def _check_extra_args(given: object, inside: str) -> None:
    """Refuse vLLM's field for values of plugins. In a request such values could have no effect."""
    if given is not None and not isinstance(given, Mapping):
        raise _field_error(inside, "vllm_xargs", f"must be an object of names and values, got {shown(given)}")
    if given:
        raise _field_error(
            inside, "vllm_xargs", f"has {shown(next(iter(given)))}, which Shoal does not read: leave it out"
        )


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
