"""The endpoint /v1/chat/completions: the next message of a conversation."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.errors import RequestError
from shoal.llm.deltas import Delta
from shoal.openai.answers import chat_choice, chat_logprobs, logprobs_by_id, usage
from shoal.openai.tools.call_deltas import CallDeltas, message_of
from shoal.openai.tools.tool_plan import ToolPlan, plan_tools
from shoal.outputs import CompletionOutput, RequestOutput
from shoal.params import SamplingParams
from shoal.server.api import body_reader
from shoal.server.api.answer_schemas import ChatAnswer
from shoal.server.api.output_streams import (
    TokenForms,
    begin,
    check_grammars,
    finished,
    in_parts,
    json_size,
    merged,
)
from shoal.server.api.request_parameters import (
    check_outputs,
    check_tokens,
    client_names,
    ignored_headers,
    read_apart,
    sampling_params,
    stream_usage,
)
from shoal.server.api.request_schemas import ChatBody, TemplateFields
from shoal.server.api.service import RankHeader, RequestPlacement, Service, new_id, respond
from shoal.server.backend import TokenStream
from shoal.server.http.errors import GENERATION_ERRORS, named_by_client
from shoal.server.http.event_streams import STREAM_DESCRIPTION, ChunkWriter, EventStream, while_connected
from shoal.server.http.json_encoding import EncodedList, json_pieces, json_text
from shoal.server.http.work_threads import off_loop
from shoal.text.prompts import Job

_READ_HERE = (
    "tools", "tool_choice", "add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs",
    "reasoning_effort", "add_special_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _ChatRequest:
    """The contents of a request, read and checked."""

    id: str
    created: int
    model: str
    job: Job
    params: SamplingParams
    names: Mapping[str, str]  # our names of parameters -> the client's names, where they differ
    plan: ToolPlan
    prompt_logprobs: bool
    forms: TokenForms
    usage: bool  # a last chunk has the usage
    usage_in_all: bool  # every other chunk has it too


def routes(service: Service) -> APIRouter:
    router = body_reader.router("OpenAI")

    @router.post(
        "/v1/chat/completions",
        responses={200: {"model": ChatAnswer, **STREAM_DESCRIPTION}, **GENERATION_ERRORS},
        response_class=Response,
    )
    async def create_chat_completion(body: ChatBody, request: Request, rank: RankHeader = None) -> Response:
        """Generate the next message of a conversation, `n` times."""
        return await while_connected(request, _chat(service, body, RequestPlacement.of(body, rank)))

    return router


async def _chat(service: Service, body: ChatBody, place: RequestPlacement) -> Response:
    asked = await read_apart(partial(_read, service, body), body)
    with named_by_client(asked.names):
        await check_grammars(service.llm, [asked.job])
        streams = await begin(service, [asked.job], place)
        if not body.stream:
            (output,) = await finished(streams)
            make, size = partial(_answer, asked, output), _answer_size(asked, output)
            return await respond(make, size, ignored_headers([asked.job]))
        events = _events(asked, streams[0])
        return EventStream(await anext(events), events, headers=ignored_headers([asked.job]))


def _read(service: Service, body: ChatBody) -> _ChatRequest:
    """Return what a body asks for.

    Raises:
        RequestError, HttpError: it asks for something that it can't get.
    """
    model = service.model(body.model)
    if body.stream and body.prompt_logprobs is not None:
        why = "prompt_logprobs are not sent in a stream of a chat: leave stream out"
        raise RequestError(why, "prompt_logprobs")
    usage_wanted, usage_in_all = stream_usage(body)
    plan = plan_tools(
        body.tools, body.tool_choice, service.settings.tool_call_parser, parallel=body.parallel_tool_calls is not False
    )
    given = body.given()
    names = client_names(given, "chat")
    params = sampling_params(service, given, names, chat=True, read=_READ_HERE, plan=plan)
    check_outputs(1, params)
    template = template_arguments(service, body) | {
        "tools": plan.shown,
        "add_special_tokens": bool(body.add_special_tokens),
        "cache_salt": body.cache_salt,
    }
    with named_by_client(names):
        job = service.llm.prepare_chat(body.messages, params, **template)
    check_tokens([job], params)
    return _ChatRequest(
        id=new_id("chatcmpl", body.request_id),
        created=int(time.time()),
        model=model,
        job=job,
        params=params,
        names=names,
        plan=plan,
        prompt_logprobs=body.prompt_logprobs is not None,
        forms=TokenForms.of(service, body),
        usage=usage_wanted,
        usage_in_all=usage_in_all,
    )


def template_arguments(service: Service, body: TemplateFields) -> dict[str, Any]:
    """Return the arguments for `ChatTemplate.render` that a body gives.

    Raises:
        RequestError: the body has a template of its own, but the server does not run templates of requests.
    """
    if body.chat_template is not None and not service.settings.trust_request_chat_template:
        why = "chat_template is code that the server would run: it must be started with --trust-request-chat-template"
        raise RequestError(why, "chat_template")
    values = body.chat_template_kwargs
    if body.reasoning_effort is not None and (values is None or isinstance(values, Mapping)):
        values = {"reasoning_effort": body.reasoning_effort, **(values or {})}
    goes_on = bool(body.continue_final_message)
    generate = body.add_generation_prompt
    return {
        "chat_template": body.chat_template or service.settings.chat_template,
        "chat_template_kwargs": values,
        "add_generation_prompt": not goes_on if generate is None else generate,
        "continue_final_message": goes_on,
    }


# --- answers without a stream --------------------------------------------------------------------------------------


def _answer(asked: _ChatRequest, output: RequestOutput) -> dict[str, Any]:
    body = {
        "id": asked.id,
        "object": "chat.completion",
        "created": asked.created,
        "model": asked.model,
        "choices": [_choice(asked, each) for each in output.outputs],
        "usage": _usage(asked, sum(len(each.token_ids) for each in output.outputs), output.num_cached_tokens),
    }
    if asked.prompt_logprobs:
        body["prompt_logprobs"] = logprobs_by_id(output.prompt_logprobs or (), EncodedList())
    if asked.forms.ids:
        body["prompt_token_ids"] = output.prompt_token_ids
    return body


def _answer_size(asked: _ChatRequest, output: RequestOutput) -> int:
    size = json_size(sum(len(each.token_ids) for each in output.outputs), asked.params.logprobs)
    wanted = asked.params.prompt_logprobs
    return size + (0 if wanted is None else json_size(len(output.prompt_token_ids), wanted))


def _choice(asked: _ChatRequest, output: CompletionOutput) -> dict[str, Any]:
    plan = asked.plan
    choice = chat_choice(output, asked.params.logprobs, by_id=asked.forms.named_by_id, make_list=EncodedList)
    if asked.forms.ids:
        choice["token_ids"] = output.token_ids
    if plan.parser is not None:
        reader = CallDeltas(plan, whole=True)
        choice["message"] = message_of(reader.feed(output.text, output.finish_reason or "stop"))
        choice["finish_reason"] = reader.finish_reason(output.finish_reason)
    return choice


def _usage(asked: _ChatRequest, output_tokens: int, cached: int) -> dict[str, Any]:
    return {**usage(len(asked.job.tokens), output_tokens), "prompt_tokens_details": {"cached_tokens": cached}}


def may_cut_calls(params: SamplingParams) -> bool:
    """Return whether stop texts or stop tokens of the client can end an output within a tool call."""
    return bool(params.stop or params.stop_token_ids)


# --- streams -------------------------------------------------------------------------------------------------------


async def _events(asked: _ChatRequest, stream: TokenStream) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. The first one comes with the first tokens: until then an error can be a status."""
    writer = ChunkWriter(id=asked.id, object="chat.completion.chunk", created=asked.created, model=asked.model)
    readers = {
        index: CallDeltas(asked.plan, whole=may_cut_calls(asked.params))
        for index in range(asked.params.n)
        if asked.plan.parser is not None
    }
    begun: set[int] = set()
    output_tokens = 0
    no_usage = "null" if asked.usage else None
    prompt = f',"prompt_token_ids":{json_text(asked.job.tokens)}' if asked.forms.ids else ""
    try:
        with named_by_client(asked.names):
            async for _, deltas in merged([stream]):
                for part, size in in_parts(deltas, partial(_delta_size, asked)):
                    new = sorted({delta.index for delta in part} - begun)
                    begun.update(new)
                    output_tokens += sum(len(delta.token_ids) for delta in part)
                    choices = await off_loop(partial(_encoded_choices, asked, readers, part), size)
                    used = no_usage
                    if asked.usage_in_all:
                        used = json_text(_usage(asked, output_tokens, stream.cached_tokens))
                    heads = [_chunk_choice(index, {"role": "assistant", "content": ""}) for index in new]
                    chunks = [writer.chunk(json_text(head), used, prompt) for head in heads]
                    chunks += [writer.chunk(choice, used) for choice in choices]
                    if chunks:
                        yield "".join(chunks).encode("utf-8", "replace")
        if asked.usage:
            yield writer.chunk("", json_text(_usage(asked, output_tokens, stream.cached_tokens))).encode()
    finally:
        stream.close()


def _delta_size(asked: _ChatRequest, delta: Delta) -> int:
    return json_size(len(delta.token_ids), asked.params.logprobs)


def _encoded_choices(asked: _ChatRequest, readers: Mapping[int, CallDeltas], deltas: Sequence[Delta]) -> list[str]:
    """Return the choices of deltas as JSON."""
    return [
        "".join(json_pieces(choice))
        for delta in deltas
        for choice in _chunk_choices(asked, readers.get(delta.index), delta)
    ]


def _chunk_choices(asked: _ChatRequest, reader: CallDeltas | None, delta: Delta) -> Sequence[dict[str, Any]]:
    """Return the choices of one delta: mostly one, and more if it has several parts of tool calls."""
    finish: str | None = delta.finish_reason
    if reader is None:
        parts = [{"content": delta.text}] if delta.text else []
    else:
        parts = reader.feed(delta.text, finish)
        finish = reader.finish_reason(finish)
    logprobs = None
    if delta.logprobs is not None:
        top, by_id = asked.params.logprobs or 0, asked.forms.named_by_id
        logprobs = {"content": chat_logprobs(delta.token_ids, delta.logprobs, top, EncodedList(), by_id=by_id)}
    if not parts and (finish is not None or logprobs is not None or (asked.forms.ids and delta.token_ids)):
        parts = [{}]
    choices = [_chunk_choice(delta.index, part) for part in parts]
    if choices:
        choices[0]["logprobs"] = logprobs
        if asked.forms.ids:
            choices[0]["token_ids"] = delta.token_ids
        choices[-1] |= {"finish_reason": finish, "stop_reason": delta.stop_reason}
    return choices


def _chunk_choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
