"""The endpoint /v1/responses: text in, text or function calls out. A response is stored for a time, to be continued.

The shapes are those of OpenAI's API reference, "Responses" and "Streaming events".
"""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.errors import RequestError
from shoal.openai.parameters import read_response_format
from shoal.openai.tools.tool_plan import ToolPlan, plan_tools
from shoal.outputs import RequestOutput
from shoal.params import SamplingParams
from shoal.server.api import body_reader
from shoal.server.api.answer_schemas import ResponsesAnswer
from shoal.server.api.chat import may_cut_calls
from shoal.server.api.output_streams import begin, check_grammars, finished, json_size, merged
from shoal.server.api.request_parameters import (
    check_outputs,
    client_names,
    ignored_headers,
    read_apart,
    sampling_params,
)
from shoal.server.api.request_schemas import ResponsesBody
from shoal.server.api.responses.input_items import items_of, messages_of, references, resolved, stored_form
from shoal.server.api.responses.output_items import OutputItems
from shoal.server.api.responses.stored_conversations import StoredConversations
from shoal.server.api.service import RankHeader, RequestPlacement, Service, new_id, respond
from shoal.server.backend import TokenStream
from shoal.server.http.errors import GENERATION_ERRORS, http_error, named_by_client
from shoal.server.http.event_streams import STREAM_DESCRIPTION, EventStream, while_connected
from shoal.server.http.json_encoding import json_pieces
from shoal.server.http.work_threads import off_loop
from shoal.text.prompts import Job
from shoal.values import shown

_READ_HERE = (
    "input", "instructions", "text", "tools", "tool_choice", "include", "truncation", "previous_response_id",
    "reasoning",
)  # fmt: skip
# Fields of chats and completions that a response does not have.
_FOREIGN = (
    "n", "logprobs", "prompt_logprobs", "response_format", "max_tokens", "max_completion_tokens", "messages", "prompt",
)  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (_LOGPROBS, "reasoning.encrypted_content")  # the second one is accepted, but there never is any


@dataclass(frozen=True, slots=True)
class _ResponseRequest:
    """The contents of a request, read and checked."""

    body: ResponsesBody
    id: str
    created: float
    model: str
    job: Job
    params: SamplingParams
    names: Mapping[str, str]  # our names of parameters -> the client's names, where they differ
    plan: ToolPlan
    before: list[Any]  # the items of the conversation that it continues
    said: list[Any]  # the items of the request itself
    keep: bool  # store the response


def routes(service: Service) -> APIRouter:
    router = body_reader.router("OpenAI")
    stored = StoredConversations(service.llm, service.settings)

    @router.post(
        "/v1/responses",
        responses={200: {"model": ResponsesAnswer, **STREAM_DESCRIPTION}, **GENERATION_ERRORS},
        response_class=Response,
    )
    async def create_response(body: ResponsesBody, request: Request, rank: RankHeader = None) -> Response:
        """Answer a text or a conversation, which may continue a stored response."""
        return await while_connected(request, _respond(service, stored, body, RequestPlacement.of(body, rank)))

    return router


async def _respond(
    service: Service, stored: StoredConversations, body: ResponsesBody, place: RequestPlacement
) -> Response:
    before, said = await _conversation(stored, body)
    keep = stored.enabled and body.store is not False
    asked = await read_apart(partial(_read, service, body, before, said, keep=keep), body)
    with named_by_client(asked.names):
        await check_grammars(service.llm, [asked.job])
        streams = await begin(service, [asked.job], place)
        if body.stream:
            events = _events(asked, stored, streams[0])
            return EventStream(await anext(events), events, last=b"", headers=ignored_headers([asked.job]))
        (output,) = await finished(streams)
    size = body.size + json_size(len(output.outputs[0].token_ids), asked.params.logprobs)
    answer = await off_loop(partial(_whole_answer, asked, output), size)
    answer = await _kept(asked, stored, answer)
    return await respond(lambda: answer, size, ignored_headers([asked.job]))


def _whole_answer(asked: _ResponseRequest, output: RequestOutput) -> dict[str, Any]:
    items = OutputItems(asked.plan, asked.params.logprobs, whole=True)
    (completion,) = output.outputs
    items.feed(completion.text, completion.token_ids, completion.logprobs, completion.finish_reason or "stop")
    items.end(completion.finish_reason)
    return _answer(asked, items, completion.finish_reason, output.num_cached_tokens)


def _read(service: Service, body: ResponsesBody, before: list[Any], said: list[Any], *, keep: bool) -> _ResponseRequest:
    """Return what a body asks for.

    Args:
        before: the items of the conversation that it continues.
        said: its own items.
        keep: whether the response is to be stored.

    Raises:
        RequestError, HttpError: it asks for something that it can't get.
    """
    model = service.model(body.model)
    _check(body)
    tools = _tools(body.tools)
    parallel = body.parallel_tool_calls is not False
    plan = plan_tools(tools, _choice(body.tool_choice), service.settings.tool_call_parser, parallel=parallel)
    given = {name: value for name, value in body.given().items() if name not in ("top_logprobs", "max_output_tokens")}
    given["max_tokens"] = body.max_output_tokens
    if _LOGPROBS in (body.include or ()):
        given |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    structured = _structured_outputs(body.text)
    if structured is not None:
        given["structured_outputs"] = structured
    names = client_names(given, "responses") | ({"structured_outputs": "text.format"} if structured else {})
    params = sampling_params(service, given, names, chat=True, read=_READ_HERE, plan=plan)
    check_outputs(1, params)
    messages = messages_of(before, said, body.instructions)
    if not messages:
        raise RequestError.about("input", "must hold a message beside reasoning items, got none")
    template = {
        "chat_template": service.settings.chat_template,
        "chat_template_kwargs": _reasoning(body.reasoning),
        "tools": plan.shown,
        "cache_salt": body.cache_salt,
    }
    with named_by_client(names):
        job = service.llm.prepare_chat(messages, params, **template)
    return _ResponseRequest(
        body=body,
        id=body.request_id or new_id("resp"),
        created=time.time(),
        model=model,
        job=job,
        params=params,
        names=names,
        plan=plan,
        before=before,
        said=stored_form(said) if keep else [],
        keep=keep,
    )


async def _conversation(stored: StoredConversations, body: ResponsesBody) -> tuple[list[Any], list[Any]]:
    """Return the items that the request continues, and its own items with all references resolved.

    Raises:
        HttpError: it continues a response, or refers to an item, that is not stored.
    """
    items = items_of(body.input)
    before: list[Any] = []
    if body.previous_response_id is not None:
        turns = await stored.conversation(body.previous_response_id)
        if turns is None:
            raise stored.missing(body.previous_response_id, "previous_response_id", "previous_response_not_found")
        before = [item for turn in turns for item in turn]
    known = {item["id"]: item for item in [*before, *items] if _has_name(item)}
    known |= await stored.items([name for name in references(items) if name not in known])
    return before, resolved(items, known)


def _has_name(item: Any) -> bool:
    return isinstance(item, Mapping) and isinstance(item.get("id"), str) and item.get("type") != "item_reference"


def _reasoning(given: Any) -> dict[str, Any] | None:
    """Return the arguments for the chat template that `reasoning` asks for; None if there are none."""
    if given is None:
        return None
    effort = given.get("effort") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not (effort is None or isinstance(effort, str)):
        raise RequestError.about("reasoning", f"must be an object with an effort, got {shown(given)}")
    return None if effort is None else {"reasoning_effort": effort}


def _check(body: ResponsesBody) -> None:
    for name in _FOREIGN:
        if body.given().get(name) is not None:
            raise RequestError.about(name, "is not a field of a response: leave it out")
    if body.truncation not in (None, "disabled"):
        raise RequestError.about("truncation", f"must be disabled, got {shown(body.truncation)}")
    for name in body.include or ():
        if name not in _INCLUDABLE:
            raise RequestError.about("include", f"may hold {' and '.join(_INCLUDABLE)}, got {shown(name)}")


def _structured_outputs(text: Any) -> dict[str, Any] | None:
    """Return the structured output that `text.format` asks for; None if it asks for none."""
    wanted = text.get("format") if isinstance(text, Mapping) else text
    if wanted is None:
        return None
    if isinstance(wanted, Mapping) and wanted.get("type") == "json_schema":
        described = {name: wanted[name] for name in ("schema", "strict") if name in wanted}
        wanted = {"type": "json_schema", "json_schema": described}
    return read_response_format(wanted, "text.format")


def _tools(tools: Any) -> Any:
    """Return tools in the form that chats have."""
    if not isinstance(tools, list):
        return tools
    found = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise RequestError.about(f"tools[{i}]", f"must be a function, got {shown(tool)}")
        found.append({"type": "function", "function": {name: tool[name] for name in tool if name != "type"}})
    return found


def _choice(choice: Any) -> Any:
    """Return a `tool_choice` in the form that chats have."""
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


# --- the answer ----------------------------------------------------------------------------------------------------


async def _kept(asked: _ResponseRequest, stored: StoredConversations, answer: dict[str, Any]) -> dict[str, Any]:
    """Store an answer if that was asked for, and return it with the field that says whether it was stored."""
    if not asked.keep:
        return answer
    previous = asked.body.previous_response_id
    kept = await stored.keep(asked.id, answer, asked.said, answer["output"], previous, asked.before)
    return answer | {"store": kept}


def _answer(asked: _ResponseRequest, items: OutputItems, reason: str | None, cached: int) -> dict[str, Any]:
    used = {
        "input_tokens": len(asked.job.tokens),
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": items.num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(asked.job.tokens) + items.num_tokens,
    }
    cut = reason == "length"
    return _envelope(asked, "incomplete" if cut else "completed") | {
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": items.items,
        "usage": used,
    }


def _envelope(asked: _ResponseRequest, status: str) -> dict[str, Any]:
    """Return a response without output."""
    body = asked.body
    return {
        "id": asked.id,
        "object": "response",
        "created_at": asked.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": asked.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None, **body.reasoning} if body.reasoning else None,
        "store": asked.keep,
        "temperature": asked.params.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or ("auto" if body.tools else "none"),
        "tools": [{"parameters": None, "strict": None, **tool} for tool in body.tools or ()],
        "top_p": asked.params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


async def _events(
    asked: _ResponseRequest, stored: StoredConversations, stream: TokenStream
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. The first come with the first tokens: until then an error can be a status."""
    items = OutputItems(asked.plan, asked.params.logprobs, whole=may_cut_calls(asked.params))
    sequence = 0

    def encoded(events: Sequence[dict[str, Any]]) -> bytes:
        nonlocal sequence
        texts = []
        for event in events:
            texts.append(
                f"event: {event['type']}\ndata: {''.join(json_pieces(event | {'sequence_number': sequence}))}\n\n"
            )
            sequence += 1
        return "".join(texts).encode("utf-8", "replace")

    begun: list[dict[str, Any]] = [
        {"type": f"response.{kind}", "response": _envelope(asked, "in_progress")} for kind in ("created", "in_progress")
    ]
    reason: str | None = None
    try:
        async for _, deltas in merged([stream]):
            found, begun = begun, []
            for delta in deltas:
                reason = delta.finish_reason
                found += items.feed(delta.text, delta.token_ids, delta.logprobs, reason)
            if found:
                yield encoded(found)
        answer = _answer(asked, items, reason, stream.cached_tokens)
        closing = items.end(reason)
        answer = await _kept(asked, stored, answer | {"output": items.items})
        yield encoded([*closing, {"type": f"response.{answer['status']}", "response": answer}])
    except Exception as error:
        if begun:  # nothing was sent yet, so the error can be the status
            raise
        failed = _envelope(asked, "failed") | {"error": {"code": "server_error", "message": http_error(error).message}}
        yield encoded([{"type": "response.failed", "response": failed}])
    finally:
        stream.close()
