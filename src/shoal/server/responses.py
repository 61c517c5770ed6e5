"""/v1/responses in its basic form: text in, text or function calls out. Nothing is stored.

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
from shoal.frontend.openai.answers import chat_logprobs
from shoal.frontend.openai.parameters import structured_of
from shoal.frontend.prompts import Job
from shoal.server import bodies
from shoal.server.backend import TokenStream
from shoal.server.encoding import text_of
from shoal.server.errors import ANSWERING, Refusal, of_request, refusal_of
from shoal.server.running import (
    Place,
    RankHeader,
    Service,
    apart_from_the_loop,
    begin,
    check_outputs,
    finished,
    identifier,
    merged,
    names_of,
    params_of,
    prepared,
    respond,
    weight_of,
)
from shoal.server.schemas import ResponsesAnswer, ResponsesBody
from shoal.server.streaming import STREAMED, EventStream, answered
from shoal.server.tools.choice import CallDeltas, ToolPlan, plan_tools
from shoal.types import RequestOutput, SamplingParams, shown

_READ = ("input", "instructions", "text", "tools", "tool_choice", "include", "truncation")
_OF_CHATS = ("n", "logprobs", "prompt_logprobs", "response_format", "max_tokens", "max_completion_tokens")
_LOGPROBS = "message.output_text.logprobs"
_TEXTS = ("input_text", "output_text", "text")


@dataclass(frozen=True, slots=True)
class _Request:
    """A body, understood."""

    body: ResponsesBody
    id: str
    created: float
    model: str
    job: Job
    params: SamplingParams
    plan: ToolPlan


def routes(service: Service) -> APIRouter:
    router = bodies.router("OpenAI")

    @router.post(
        "/v1/responses", responses={200: {"model": ResponsesAnswer, **STREAMED}, **ANSWERING}, response_class=Response
    )
    async def create_response(body: ResponsesBody, request: Request, rank: RankHeader = None) -> Response:
        """An answer to a text or a conversation. It is not stored: each request brings what came before."""
        return await answered(request, _respond(service, body, Place.of(body, rank)))

    return router


async def _respond(service: Service, body: ResponsesBody, place: Place) -> Response:
    asked = await apart_from_the_loop(partial(_understood, service, body), body)
    streams = begin(service.llm, [asked.job], place)
    if body.stream:
        events = _events(asked, streams[0])
        return EventStream(await anext(events), events, last=b"")
    (output,) = await finished(streams)
    weight = body.weight + weight_of(len(output.outputs[0].token_ids), asked.params.logprobs)
    return await respond(partial(_whole, asked, output), weight)


def _whole(asked: _Request, output: RequestOutput) -> dict[str, Any]:
    items = _Items(asked.plan, asked.params.logprobs)
    (completion,) = output.outputs
    items.feed(completion.text, completion.token_ids, completion.logprobs, last=True)
    items.end(completion.finish_reason)
    return _answer(asked, items, completion.finish_reason, output.num_cached_tokens)


def _understood(service: Service, body: ResponsesBody) -> _Request:
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
    messages = _messages(body)
    template = {"chat_template": service.settings.chat_template, "tools": plan.shown}
    job = prepared(
        partial(service.llm.prepare_chat, messages, params, **template),
        names=names,
        prompt="input",
    )
    return _Request(body, identifier("resp"), time.time(), model, job, params, plan)


def _check(body: ResponsesBody) -> None:
    for name in _OF_CHATS:
        if body.given().get(name) is not None:
            raise Refusal(400, f"{name} is no field of a response: leave it out", param=name)
    if body.truncation not in (None, "disabled"):
        raise Refusal(400, f"truncation must be disabled, got {shown(body.truncation)}", param="truncation")
    for name in body.include or ():
        if name != _LOGPROBS:
            raise Refusal(400, f"include may hold {_LOGPROBS}, got {shown(name)}", param="include")
    for name in ("tools", "text"):
        try:
            text_of(getattr(body, name))
        except ValueError:
            raise Refusal(400, f"{name} holds a number that JSON does not have", param=name) from None


def _format(text: Any) -> dict[str, Any] | None:
    """The structured output that `text.format` asks for."""
    wanted = text.get("format") if isinstance(text, Mapping) else text
    if wanted is None:
        return None
    if isinstance(wanted, Mapping) and wanted.get("type") == "json_schema":
        wanted = {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
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


# --- the conversation ----------------------------------------------------------------------------------------------


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not isinstance(body.input, list) or not body.input:
        raise Refusal(400, f"input must be a text or a list of items, got {shown(body.input)}", param="input")
    for i, item in enumerate(body.input):
        message = _message(item, f"input[{i}]")
        last = messages[-1] if messages else {}
        if "tool_calls" in message and last.get("role") == "assistant":  # text and calls side by side are one turn
            last.setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
    return messages


def _message(item: Any, where: str) -> dict[str, Any]:
    kind = item.get("type", "message") if isinstance(item, Mapping) else None
    match kind:
        case "message":
            if not isinstance(item.get("role"), str):
                why = f"{where}.role must be a text such as user, got {shown(item.get('role'))}"
                raise Refusal(400, why, param=f"{where}.role")
            return {"role": item["role"], "content": _content(item.get("content"), f"{where}.content")}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        case "function_call_output":
            content = _content(item.get("output"), f"{where}.output")
            return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    why = f"{where} must be a message, a function_call or a function_call_output, got {shown(kind or item)}"
    raise Refusal(400, why, param=where)


def _content(content: Any, where: str) -> Any:
    if not isinstance(content, list):
        return content
    found = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXTS:
            why = f"{where}[{i}]: parts of type {shown(kind)} can't be read; this engine takes text"
            raise Refusal(400, why, param=f"{where}[{i}]")
        found.append({"type": "text", "text": part.get("text")})
    return found


# --- the answer ----------------------------------------------------------------------------------------------------


class _Items:
    """The items of an output as they grow. What is done to them is given as events."""

    def __init__(self, plan: ToolPlan, top: int | None) -> None:
        """`top`: how many of the likeliest tokens are told, where log-probabilities are."""
        self.items: list[dict[str, Any]] = []
        self.written = 0  # tokens
        self._reader = CallDeltas(plan) if plan.parser is not None else None
        self._top = top or 0
        self._open = False  # the last item may grow
        self._known: list[dict[str, Any]] = []  # of tokens whose text is not certain yet

    def feed(self, text: str, tokens: Sequence[int], logprobs: Any, *, last: bool) -> list[dict[str, Any]]:
        self.written += len(tokens)
        events: list[dict[str, Any]] = []
        known = [] if logprobs is None else chat_logprobs(tokens, logprobs, self._top)["content"]
        if self._reader is None:
            return self._text(text, known) if text or known else events
        self._known += known
        for delta in self._reader.feed(text, last=last):
            if "content" in delta:
                known, self._known = self._known, []
                events += self._text(delta["content"], known)
            for part in delta.get("tool_calls", ()):
                events += self._call(part)
        return events

    def end(self, reason: str | None) -> list[dict[str, Any]]:
        begun = [] if self.items else self._text("", [])
        return begun + self._close("incomplete" if reason == "length" else "completed")

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if not self._open or self.items[-1]["type"] != "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"type": "message", "id": identifier("msg"), "role": "assistant", "content": []}
            events = self._begin(item)
            self.items[-1]["content"] = [part]
            events.append(self._event("response.content_part.added", content_index=0, part=dict(part)))
        (part,) = self.items[-1]["content"]
        part["text"] += text
        part["logprobs"] += logprobs
        delta = self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
        return [*events, delta]

    def _call(self, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        function = part["function"]
        if "id" in part:
            names = {"call_id": part["id"], "name": function["name"], "arguments": ""}
            return self._begin({"type": "function_call", "id": identifier("fc"), **names})
        self.items[-1]["arguments"] += function["arguments"]
        return [self._event("response.function_call_arguments.delta", delta=function["arguments"])]

    def _begin(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        closed = self._close("completed")
        self.items.append({**item, "status": "in_progress"})
        self._open = True
        return [*closed, self._item_event("response.output_item.added")]

    def _close(self, status: str) -> list[dict[str, Any]]:
        if not self._open:
            return []
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            (part,) = item["content"]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events = [
                self._event("response.output_text.done", content_index=0, **text),
                self._event("response.content_part.done", content_index=0, part=dict(part)),
            ]
        else:
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **arguments)]
        return [*events, self._item_event("response.output_item.done")]

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **more}

    def _item_event(self, kind: str) -> dict[str, Any]:
        return {"type": kind, "output_index": len(self.items) - 1, "item": dict(self.items[-1])}


def _answer(asked: _Request, items: _Items, reason: str | None, cached: int) -> dict[str, Any]:
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


def _envelope(asked: _Request, status: str) -> dict[str, Any]:
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
        "previous_response_id": None,
        "store": False,
        "temperature": asked.params.temperature,
        "text": body.text or {"format": {"type": "text"}},
        "tool_choice": body.tool_choice or ("auto" if body.tools else "none"),
        "tools": [{"parameters": None, "strict": None, **tool} for tool in body.tools or ()],
        "top_p": asked.params.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


async def _events(asked: _Request, stream: TokenStream) -> AsyncGenerator[bytes, None]:
    """The first ones come with the first tokens: until then, the request can be refused."""
    items = _Items(asked.plan, asked.params.logprobs)
    sequence = 0

    def sent(events: Sequence[dict[str, Any]]) -> bytes:
        nonlocal sequence
        texts = []
        for event in events:
            texts.append(f"event: {event['type']}\ndata: {text_of(event | {'sequence_number': sequence})}\n\n")
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
                found += items.feed(delta.text, delta.token_ids, delta.logprobs, last=reason is not None)
            if found:
                yield sent(found)
        answer = _answer(asked, items, reason, stream.cached_tokens)
        closing = items.end(reason)
        yield sent([*closing, {"type": f"response.{answer['status']}", "response": answer}])
    except Exception as error:
        if begun:  # nothing was sent yet: it can be told by the status
            raise
        told = refusal_of(error)
        failed = _envelope(asked, "failed") | {"error": {"code": "server_error", "message": told.message}}
        yield sent([{"type": "response.failed", "response": failed}])
    finally:
        stream.close()
