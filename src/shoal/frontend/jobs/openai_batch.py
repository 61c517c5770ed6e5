"""The OpenAI batch format: a request a line in, an answer a line out.

Keys and shapes are those of OpenAI's API reference: "Batch", "Completions" and "Chat".
"""

import math
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, cast, get_args

from shoal.errors import RequestError
from shoal.frontend.jobs.entries import Endpoint, Entry, ids_of, messages_of, prompt_of
from shoal.types import CompletionOutput, Logprob, Logprobs, RequestOutput, SamplingParams

ENDPOINTS = get_args(Endpoint)
_CHAT: Endpoint = "/v1/chat/completions"
_COMPLETION_TOKENS = 16  # what OpenAI's completions give where nobody says max_tokens
# Named as in SamplingParams, vLLM's additions included.
_SAME = [
    "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "stop", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids", "ignore_eos", "min_tokens",
    "skip_special_tokens", "include_stop_str_in_output", "prompt_logprobs", "structured_outputs",
]  # fmt: skip
_WITHOUT_EFFECT = [
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "stream_options", "parallel_tool_calls",
]  # fmt: skip
_READ = ["prompt", "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "response_format"]
_LEAST = -9999.0  # JSON has no infinity; OpenAI's API writes this for a token that can't be
_OFF: tuple[object, ...] = (None, False, [], {}, "", "none")


def is_request(line: object) -> bool:
    return isinstance(line, dict) and "body" in line and ("url" in line or "method" in line or "custom_id" in line)


def entry_of(index: int, where: str, line: Mapping[str, Any]) -> Entry:
    """A request as an entry.

    Raises:
        RequestError: another method or URL, no `custom_id`, or a body that asks for what can't be given.
    """
    url, body = line.get("url"), line["body"]
    if line.get("method", "POST") != "POST":
        raise RequestError(f"`method` must be POST, got {line['method']!r}")
    if url not in ENDPOINTS:
        raise RequestError(f"`url` must be {' or '.join(ENDPOINTS)}, got {url!r}")
    if not isinstance(line.get("custom_id"), str):
        raise RequestError(f"a request of a batch needs a text `custom_id`, got {line.get('custom_id')!r}")
    if not isinstance(body, dict):
        raise RequestError("`body` must be a JSON object")
    chat = url == _CHAT
    return Entry(
        index,
        where,
        prompt=None if chat else _prompt(body.get("prompt")),
        messages=messages_of(body.get("messages")) if chat else None,
        sampling=_sampling(body, chat=chat),
        ids=ids_of({"custom_id": line["custom_id"]}),
        endpoint=cast(Endpoint, url),
        model=body["model"] if isinstance(body.get("model"), str) else None,
        batch=True,
    )


def refused(index: int, where: str, line: Mapping[str, Any], why: str) -> Entry:
    """The entry of a request that can't be used: its answer is in the batch format too, whatever is wrong with it."""
    url = line.get("url")
    endpoint = cast(Endpoint, url) if url in ENDPOINTS else None
    return Entry(
        index, where, error=why, ids=ids_of({"custom_id": line.get("custom_id")}), endpoint=endpoint, batch=True
    )


def defaults(endpoint: Endpoint) -> SamplingParams:
    """What holds where neither the request nor a flag nor the model says anything."""
    return SamplingParams(max_tokens=None if endpoint == _CHAT else _COMPLETION_TOKENS)


def _prompt(prompt: object) -> Any:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and any(isinstance(part, str | list) for part in prompt):
        raise RequestError(f"`prompt` has {len(prompt)} prompts: give each a line of its own")
    return prompt_of("prompt_token_ids" if isinstance(prompt, list) else "prompt", prompt)


def _sampling(body: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """The body's parameters by our names; null is as good as not given."""
    for name, value in body.items():
        if name not in _SAME and name not in _WITHOUT_EFFECT and name not in _READ and value not in _OFF:
            raise RequestError(f"`body.{name}` can't be obeyed; leave it out")
    found = {name: body[name] for name in _SAME if body.get(name) is not None}
    for name in ("max_tokens", "max_completion_tokens"):  # the second is the first's successor
        if body.get(name) is not None:
            found["max_tokens"] = body[name]
    found |= _logprobs(body, chat=chat)
    if body.get("response_format") is not None:
        found |= _structured(body["response_format"])
    return found


def _logprobs(body: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if not chat:
        return {} if wanted is None else {"logprobs": wanted}
    if wanted not in (None, True, False):
        raise RequestError(f"`body.logprobs` must be true or false, got {wanted!r}; how many is `top_logprobs`")
    if not wanted and top:
        raise RequestError("`body.top_logprobs` needs `logprobs` to be true")
    return {"logprobs": top or 0} if wanted else {}


def _structured(wanted: object) -> dict[str, Any]:
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"structured_outputs": {"json_object": True}}
    if isinstance(wanted, dict) and kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise RequestError("`body.response_format.json_schema.schema` must be a JSON schema")
        return {"structured_outputs": {"json": schema}}
    raise RequestError(f"`body.response_format.type` must be text, json_object or json_schema, got {kind!r}")


# --- answers -----------------------------------------------------------------------------------------------------


def answer(entry: Entry, output: RequestOutput, model: str) -> dict[str, Any]:
    """The line of a request that was answered."""
    name = f"{entry.index:08d}"
    chat = entry.endpoint == _CHAT
    used = [len(output.prompt_token_ids), sum(len(each.token_ids) for each in output.outputs)]
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": entry.model or model,
        "choices": [(_chat_choice if chat else _completion_choice)(each) for each in output.outputs],
        "usage": {"prompt_tokens": used[0], "completion_tokens": used[1], "total_tokens": sum(used)},
    }
    response = {"status_code": 200, "request_id": f"req-{name}", "body": body}
    return {"id": f"batch_req-{name}", **entry.ids, "response": response, "error": None}


def failure(entry: Entry, why: str) -> dict[str, Any]:
    """The line of a request that has no answer."""
    error = {"code": "invalid_request", "message": why}
    return {"id": f"batch_req-{entry.index:08d}", **entry.ids, "response": None, "error": error}


def _chat_choice(output: CompletionOutput) -> dict[str, Any]:
    wanted = output.logprobs
    logprobs = None if wanted is None else {"content": [_position(*pair) for pair in _chosen(output, wanted)]}
    message = {"role": "assistant", "content": output.text}
    return {
        "index": output.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def _completion_choice(output: CompletionOutput) -> dict[str, Any]:
    wanted = output.logprobs
    logprobs = None
    if wanted is not None:
        chosen = _chosen(output, wanted)
        texts = [_text(token, each[token]) for token, each in chosen]
        logprobs = {
            "text_offset": [0, *accumulate(map(len, texts[:-1]))] if texts else [],
            "tokens": texts,
            "token_logprobs": [finite(each[token].logprob) for token, each in chosen],
            "top_logprobs": [
                {_text(t, known): finite(known.logprob) for t, known in each.items()} for _, each in chosen
            ],
        }
    return {
        "index": output.index,
        "text": output.text,
        "logprobs": logprobs,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def _chosen(output: CompletionOutput, logprobs: Sequence[Logprobs]) -> list[tuple[int, Logprobs]]:
    return list(zip(output.token_ids, logprobs, strict=False))


def _position(token: int, each: Logprobs) -> dict[str, Any]:
    return {**_token(token, each[token]), "top_logprobs": [_token(*pair) for pair in each.items()]}


def _token(token: int, known: Logprob) -> dict[str, Any]:
    text = _text(token, known)
    return {"token": text, "logprob": finite(known.logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _text(token: int, known: Logprob) -> str:
    return known.decoded_token if known.decoded_token is not None else f"token_id:{token}"


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST
