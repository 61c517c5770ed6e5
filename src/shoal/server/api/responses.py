"""/v1/responses: text in, text or function calls out. A response is stored for a time: others can go on from it.

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
from shoal.openai.parameters import structured_of
from shoal.outputs import RequestOutput
from shoal.params import SamplingParams
from shoal.server.api import bodies
from shoal.server.api.chat import may_cut
from shoal.server.api.response_input import items_of, listed, messages_of, references, resolved
from shoal.server.api.response_output import OutputItems
from shoal.server.api.response_store import Shelf
from shoal.server.api.schemas import ResponsesAnswer, ResponsesBody
from shoal.server.api.start_requests import (
    RankHeader,
    RequestPlacement,
    Service,
    apart_from_the_loop,
    begin,
    check_grammars,
    check_outputs,
    finished,
    identifier,
    ignored_headers,
    merged,
    names_of,
    params_of,
    prepared,
    respond,
    weight_of,
)
from shoal.server.backend import TokenStream
from shoal.server.http.errors import ANSWERING, Refusal, of_request, refusal_of
from shoal.server.http.event_streams import STREAMED, EventStream, answered
from shoal.server.http.json_encoding import pieces
from shoal.server.http.work_threads import apart
from shoal.server.tools.choice import ToolPlan, plan_tools
from shoal.text.prompts import Job
from shoal.values import shown

_READ = (
    "input", "instructions", "text", "tools", "tool_choice", "include", "truncation", "previous_response_id",
    "reasoning",
)  # fmt: skip
_OF_CHATS = (
    "n", "logprobs", "prompt_logprobs", "response_format", "max_tokens", "max_completion_tokens", "messages", "prompt",
)  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (_LOGPROBS, "reasoning.encrypted_content")  # of the second there is none


@dataclass(frozen=True, slots=True)
class _ResponseRequest:
    """A body, understood."""

    body: ResponsesBody
    id: str
    created: float
    model: str
    job: Job
    params: SamplingParams
    names: Mapping[str, str]  # our names of parameters as the client wrote them
    plan: ToolPlan
    before: list[Any]  # items of the conversation that it goes on from
    said: list[Any]  # ... and those of the request
    keep: bool


def routes(service: Service) -> APIRouter:
    router = bodies.router("OpenAI")
    shelf = Shelf(service.llm, service.settings)

    @router.post(
        "/v1/responses", responses={200: {"model": ResponsesAnswer, **STREAMED}, **ANSWERING}, response_class=Response
    )
    async def create_response(body: ResponsesBody, request: Request, rank: RankHeader = None) -> Response:
        """An answer to a text or a conversation, or to what goes on from a stored response."""
        return await answered(request, _respond(service, shelf, body, RequestPlacement.of(body, rank)))

    return router


async def _respond(service: Service, shelf: Shelf, body: ResponsesBody, place: RequestPlacement) -> Response:
    before, said = await _conversation(shelf, body)
    keep = shelf.open and body.store is not False
    asked = await apart_from_the_loop(partial(_understood, service, body, before, said, keep=keep), body)
    await check_grammars(service.llm, [asked.job], asked.names)
    streams = await begin(service, [asked.job], place)
    if body.stream:
        events = _events(asked, shelf, streams[0])
        return EventStream(await anext(events), events, last=b"", headers=ignored_headers([asked.job]))
    (output,) = await finished(streams)
    weight = body.weight + weight_of(len(output.outputs[0].token_ids), asked.params.logprobs)
    answer = await apart(partial(_whole, asked, output), weight)
    answer = await _kept(asked, shelf, answer)
    return await respond(lambda: answer, weight, ignored_headers([asked.job]))


def _whole(asked: _ResponseRequest, output: RequestOutput) -> dict[str, Any]:
    items = OutputItems(asked.plan, asked.params.logprobs, whole=True)
    (completion,) = output.outputs
    items.feed(completion.text, completion.token_ids, completion.logprobs, completion.finish_reason or "stop")
    items.end(completion.finish_reason)
    return _answer(asked, items, completion.finish_reason, output.num_cached_tokens)


def _understood(
    service: Service, body: ResponsesBody, before: list[Any], said: list[Any], *, keep: bool
) -> _ResponseRequest:
    """
    Raises:
        Refusal: it can't be used.
    """
    model = service.model(body.model)
    _check(body)
    tools = _tools(body.tools)
    parallel = body.parallel_tool_calls is not False
    plan = plan_tools(tools, _choice(body.tool_choice), service.settings.tool_call_parser, parallel=parallel)
    given = {name: value for name, value in body.given().items() if name not in ("top_logprobs", "max_output_tokens")}
    names = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
    given["max_tokens"] = body.max_output_tokens
    if _LOGPROBS in (body.include or ()):
        given |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    structured = _format(body.text)
    if structured is not None:
        given["structured_outputs"] = structured
    names |= {"structured_outputs": "text.format"} if structured else names_of(given, chat=False)
    params = params_of(service, given, chat=True, read=_READ, plan=plan)
    check_outputs(1, params)
    messages = messages_of(before, said, body.instructions)
    if not messages:
        raise Refusal(400, "input must hold a message beside what was thought, got none", param="input")
    template = {
        "chat_template": service.settings.chat_template,
        "chat_template_kwargs": _reasoning(body.reasoning),
        "tools": plan.shown,
        "cache_salt": body.cache_salt,
    }
    job = prepared(
        partial(service.llm.prepare_chat, messages, params, **template),
        names=names,
        prompt="input",
    )
    name = body.request_id or identifier("resp")
    return _ResponseRequest(
        body, name, time.time(), model, job, params, names, plan, before, listed(said) if keep else [], keep
    )


async def _conversation(shelf: Shelf, body: ResponsesBody) -> tuple[list[Any], list[Any]]:
    """The items that the request goes on from, and its own, without references.

    Raises:
        Refusal: it goes on from what is not here.
    """
    items = items_of(body.input)
    before: list[Any] = []
    if body.previous_response_id is not None:
        turns = await shelf.conversation(body.previous_response_id)
        if turns is None:
            raise shelf.missing(body.previous_response_id, "previous_response_id", "previous_response_not_found")
        before = [item for turn in turns for item in turn]
    known = {item["id"]: item for item in [*before, *items] if _has_name(item)}
    known |= await shelf.items([name for name in references(items) if name not in known])
    return before, resolved(items, known)


def _has_name(item: Any) -> bool:
    return isinstance(item, Mapping) and isinstance(item.get("id"), str) and item.get("type") != "item_reference"


def _reasoning(given: Any) -> dict[str, Any] | None:
    """What the template is told of it."""
    if given is None:
        return None
    effort = given.get("effort") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not (effort is None or isinstance(effort, str)):
        raise Refusal(400, f"reasoning must be an object with an effort, got {shown(given)}", param="reasoning")
    return None if effort is None else {"reasoning_effort": effort}


def _check(body: ResponsesBody) -> None:
    for name in _OF_CHATS:
        if body.given().get(name) is not None:
            raise Refusal(400, f"{name} is no field of a response: leave it out", param=name)
    if body.truncation not in (None, "disabled"):
        raise Refusal(400, f"truncation must be disabled, got {shown(body.truncation)}", param="truncation")
    for name in body.include or ():
        if name not in _INCLUDABLE:
            raise Refusal(400, f"include may hold {' and '.join(_INCLUDABLE)}, got {shown(name)}", param="include")


def _format(text: Any) -> dict[str, Any] | None:
    """The structured output that `text.format` asks for."""
    wanted = text.get("format") if isinstance(text, Mapping) else text
    if wanted is None:
        return None
    if isinstance(wanted, Mapping) and wanted.get("type") == "json_schema":
        described = {name: wanted[name] for name in ("schema", "strict") if name in wanted}
        wanted = {"type": "json_schema", "json_schema": described}
    try:
        return structured_of(wanted, "text.format")
    except RequestError as error:
        raise of_request(error) from None


def _tools(tools: Any) -> Any:
    """As chats have them."""
    if not isinstance(tools, list):
        return tools
    found = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise Refusal(400, f"tools[{i}] must be a function, got {shown(tool)}", param=f"tools[{i}]")
        found.append({"type": "function", "function": {name: tool[name] for name in tool if name != "type"}})
    return found


def _choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


# --- the answer ----------------------------------------------------------------------------------------------------


async def _kept(asked: _ResponseRequest, shelf: Shelf, answer: dict[str, Any]) -> dict[str, Any]:
    """The answer, which says whether it was stored."""
    if not asked.keep:
        return answer
    previous = asked.body.previous_response_id
    kept = await shelf.keep(asked.id, answer, asked.said, answer["output"], previous, asked.before)
    return answer | {"store": kept}


def _answer(asked: _ResponseRequest, items: OutputItems, reason: str | None, cached: int) -> dict[str, Any]:
    used = {
        "input_tokens": len(asked.job.tokens),
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": items.written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(asked.job.tokens) + items.written,
    }
    cut = reason == "length"
    return _envelope(asked, "incomplete" if cut else "completed") | {
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": items.items,
        "usage": used,
    }


def _envelope(asked: _ResponseRequest, status: str) -> dict[str, Any]:
    """A response without its output."""
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


async def _events(asked: _ResponseRequest, shelf: Shelf, stream: TokenStream) -> AsyncGenerator[bytes, None]:
    """The first ones come with the first tokens: until then, the request can be refused."""
    items = OutputItems(asked.plan, asked.params.logprobs, whole=may_cut(asked.params))
    sequence = 0

    def sent(events: Sequence[dict[str, Any]]) -> bytes:
        nonlocal sequence
        texts = []
        for event in events:
            texts.append(f"event: {event['type']}\ndata: {''.join(pieces(event | {'sequence_number': sequence}))}\n\n")
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
                yield sent(found)
        answer = _answer(asked, items, reason, stream.cached_tokens)
        closing = items.end(reason)
        answer = await _kept(asked, shelf, answer | {"output": items.items})
        yield sent([*closing, {"type": f"response.{answer['status']}", "response": answer}])
    except Exception as error:
        if begun:  # nothing was sent yet: it can be told by the status
            raise
        told = refusal_of(error)
        failed = _envelope(asked, "failed") | {"error": {"code": "server_error", "message": told.message}}
        yield sent([{"type": "response.failed", "response": failed}])
    finally:
        stream.close()
