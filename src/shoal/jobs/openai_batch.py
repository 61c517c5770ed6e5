"""OpenAI's batch format: each line of the input is a request, each line of the output an answer.

Keys and shapes are those of OpenAI's API reference: "Batch", "Completions" and "Chat".
"""

import time
from collections.abc import Mapping
from typing import Any, cast, get_args

from shoal.errors import RequestError
from shoal.jobs.entries import Endpoint, JobEntry, find_ids, parse_messages, parse_prompt
from shoal.openai import parameters
from shoal.openai.answers import chat_choice, completion_choice, usage
from shoal.openai.parameters import read_sampling
from shoal.outputs import RequestOutput
from shoal.params import SamplingParams

ENDPOINTS = get_args(Endpoint)
_CHAT: Endpoint = "/v1/chat/completions"
_SHOWN = ("return_token_ids", "return_tokens_as_token_ids")


def is_request(line: object) -> bool:
    return isinstance(line, dict) and "body" in line and ("url" in line or "method" in line or "custom_id" in line)


def parse_request(index: int, where: str, line: Mapping[str, Any]) -> JobEntry:
    """Return the entry of a request.

    Raises:
        RequestError: the method or URL is another one, there is no `custom_id`, or the body can't be used.
    """
    url, body = line.get("url"), line["body"]
    if line.get("method", "POST") != "POST":
        raise RequestError(f"`method` must be POST, got {line['method']!r}", "method")
    if url not in ENDPOINTS:
        raise RequestError(f"`url` must be {' or '.join(ENDPOINTS)}, got {url!r}", "url")
    if not isinstance(line.get("custom_id"), str):
        why = f"a request of a batch needs a text `custom_id`, got {line.get('custom_id')!r}"
        raise RequestError(why, "custom_id")
    if not isinstance(body, dict):
        raise RequestError("`body` must be a JSON object", "body")
    chat = url == _CHAT
    return JobEntry(
        index,
        where,
        prompt=None if chat else _prompt(body.get("prompt")),
        messages=parse_messages(body.get("messages")) if chat else None,
        sampling=read_sampling(body, chat=chat, read=_SHOWN, inside="body."),
        ids=find_ids({"custom_id": line["custom_id"]}),
        endpoint=cast(Endpoint, url),
        model=body["model"] if isinstance(body.get("model"), str) else None,
        cache_salt=body.get("cache_salt"),
        return_token_ids=_read_bool(body, "return_token_ids"),
        tokens_as_ids=_read_bool(body, "return_tokens_as_token_ids"),
        is_batch_request=True,
    )


def refused_entry(index: int, where: str, line: Mapping[str, Any], why: str) -> JobEntry:
    """Return the entry of a request that can't be used. Its answer is in the batch format, too."""
    url = line.get("url")
    endpoint = cast(Endpoint, url) if url in ENDPOINTS else None
    return JobEntry(
        index,
        where,
        error=why,
        ids=find_ids({"custom_id": line.get("custom_id")}),
        endpoint=endpoint,
        is_batch_request=True,
    )


def _read_bool(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"`body.{name}` must be true or false, got {value!r}", f"body.{name}")
    return bool(value)


def defaults(endpoint: Endpoint) -> SamplingParams:
    """Return the parameters that hold if neither the request nor a flag nor the model sets them."""
    return parameters.defaults(chat=endpoint == _CHAT)


def _prompt(prompt: object) -> Any:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, list) and any(isinstance(part, str | list) for part in prompt):
        raise RequestError(f"`prompt` has {len(prompt)} prompts: write each into a separate line", "prompt")
    return parse_prompt("prompt_token_ids" if isinstance(prompt, list) else "prompt", prompt)


# --- answers -----------------------------------------------------------------------------------------------------


def answer_line(entry: JobEntry, output: RequestOutput, model: str) -> dict[str, Any]:
    """Return the line of a request that was answered."""
    name = f"{entry.index:08d}"
    chat = entry.endpoint == _CHAT
    used = usage(len(output.prompt_token_ids), sum(len(each.token_ids) for each in output.outputs))
    top = entry.sampling.get("logprobs", -1)
    choices = [
        chat_choice(each, top, by_id=entry.tokens_as_ids)
        if chat
        else completion_choice(each, by_id=entry.tokens_as_ids)
        for each in output.outputs
    ]
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": entry.model or model,
        "choices": choices,
        "usage": used,
    }
    if entry.return_token_ids:
        for choice, each in zip(choices, output.outputs, strict=True):
            choice["token_ids"] = list(each.token_ids)
        for target in [body] if chat else choices:
            target["prompt_token_ids"] = list(output.prompt_token_ids)
    response = {"status_code": 200, "request_id": f"req-{name}", "body": body}
    return {"id": f"batch_req-{name}", **entry.ids, "response": response, "error": None}


def failed_line(entry: JobEntry, why: str) -> dict[str, Any]:
    """Return the line of a request that failed."""
    error = {"code": "invalid_request", "message": why}
    return {"id": f"batch_req-{entry.index:08d}", **entry.ids, "response": None, "error": error}
