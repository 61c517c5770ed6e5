"""/v1/completions: text behind a text."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.llm.deltas import Delta
from shoal.openai.answers import completion_choice, completion_logprobs, legacy_name, positions, usage
from shoal.outputs import CompletionOutput, FinishReason, Logprobs, RequestOutput
from shoal.params import Prompt, SamplingParams
from shoal.server.api import bodies
from shoal.server.api.schemas import MOST_OUTPUTS, CompletionAnswer, CompletionBody
from shoal.server.api.start_requests import (
    RankHeader,
    RequestPlacement,
    Service,
    TokenForms,
    apart_from_the_loop,
    begin,
    check_grammars,
    check_outputs,
    check_tokens,
    close,
    finished,
    identifier,
    ignored_headers,
    merged,
    names_of,
    params_of,
    parted,
    prepared,
    respond,
    stream_usage,
    weight_of,
)
from shoal.server.api.token_positions import TokenPositions
from shoal.server.backend import TokenStream
from shoal.server.http.errors import ANSWERING, Refusal
from shoal.server.http.event_streams import STREAMED, ChunkWriter, EventStream, answered
from shoal.server.http.json_encoding import EncodedList, pieces, text_of
from shoal.server.http.work_threads import apart
from shoal.text.prompts import Job, salted
from shoal.text.token_offsets import prompt_offsets, prompt_text
from shoal.values import shown


@dataclass(frozen=True, slots=True)
class _CompletionRequest:
    """A body, understood. `jobs`: one a prompt."""

    id: str
    created: int
    model: str
    jobs: Sequence[Job]
    echoes: Sequence["_Echo"]  # one a prompt
    params: SamplingParams
    names: Mapping[str, str]  # our names of parameters as the client wrote them
    empty: bool  # max_tokens is 0: nothing but the prompt is wanted
    prompt_logprobs: bool  # they are asked for by name
    forms: TokenForms
    usage: bool  # a last chunk says it
    usage_always: bool  # so does every other


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt as it is shown before its outputs, if it is."""

    tokens: tuple[int, ...]
    wanted: bool = False
    text: str = ""
    first: str = ""  # how its first token is called
    offsets: Sequence[int] = ()  # where its tokens begin in `text`, if log-probabilities are wanted


def routes(service: Service) -> APIRouter:
    router = bodies.router("OpenAI")

    @router.post(
        "/v1/completions",
        responses={200: {"model": CompletionAnswer, **STREAMED}, **ANSWERING},
        response_class=Response,
    )
    async def create_completion(body: CompletionBody, request: Request, rank: RankHeader = None) -> Response:
        """Text behind each prompt: `n` choices for each, numbered prompt by prompt."""
        return await answered(request, _complete(service, body, RequestPlacement.of(body, rank)))

    return router


async def _complete(service: Service, body: CompletionBody, place: RequestPlacement) -> Response:
    asked = await apart_from_the_loop(partial(_understood, service, body), body)
    await check_grammars(service.llm, asked.jobs, asked.names)
    streams = await begin(service, asked.jobs, place)
    if not body.stream:
        outputs = await finished(streams)
        make, weight = partial(_answer, asked, outputs), _weight(asked, outputs)
        return await respond(make, weight, ignored_headers(asked.jobs))
    events = _events(asked, streams)
    return EventStream(await anext(events), events, headers=ignored_headers(asked.jobs))


def _understood(service: Service, body: CompletionBody) -> _CompletionRequest:
    """
    Raises:
        Refusal: it can't be used.
    """
    model = service.model(body.model)
    usage_wanted, usage_always = stream_usage(body)
    given = body.given()
    empty = body.max_tokens == 0
    if empty and not body.echo:
        raise Refusal(400, "max_tokens must be at least 1, but where echo is true, got 0", param="max_tokens")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise Refusal(400, "best_of can't be obeyed: leave it out, and choose among n outputs", param="best_of")
    prompts = _prompts(body.prompt)
    given |= {"max_tokens": 1} if empty else {}
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        given["prompt_logprobs"] = body.logprobs
    params = params_of(service, given, chat=False, read=("echo", "best_of", "add_special_tokens"))
    check_outputs(len(prompts), params)
    names = names_of(given, chat=False)
    jobs = [
        prepared(
            partial(
                service.llm.prepare,
                salted(prompt, body.cache_salt),
                params,
                add_special_tokens=body.add_special_tokens is not False,
            ),
            names=names,
            prompt="prompt" if len(prompts) == 1 else f"prompt[{i}]",
        )
        for i, prompt in enumerate(prompts)
    ]
    check_tokens(jobs, params)
    return _CompletionRequest(
        id=identifier("cmpl", body.request_id),
        created=int(time.time()),
        model=model,
        jobs=jobs,
        echoes=[_echo(service, job, wanted=bool(body.echo), alone=empty) for job in jobs],
        params=params,
        names=names,
        empty=empty,
        prompt_logprobs=body.prompt_logprobs is not None,
        forms=TokenForms.of(service, body),
        usage=usage_wanted,
        usage_always=usage_always,
    )


def _prompts(given: Any) -> list[Prompt]:
    """One text, or one list of ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        why = f"prompt must be a text, a list of texts, a list of token ids or a list of such lists, got {shown(given)}"
        raise Refusal(400, why, param="prompt")
    if _is_id(given[0]):
        return [{"prompt_token_ids": given}]
    if len(given) > MOST_OUTPUTS:
        why = f"a request may have {MOST_OUTPUTS} outputs, got {len(given)} prompts: send several"
        raise Refusal(400, why, param="prompt")
    return [_prompt(each, f"prompt[{i}]") for i, each in enumerate(given)]


def _prompt(each: Any, where: str) -> Any:
    if isinstance(each, str):
        return each
    if isinstance(each, list):
        return {"prompt_token_ids": each}
    raise Refusal(400, f"{where} must be a text or a list of token ids, got {shown(each)}", param=where)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _echo(service: Service, job: Job, *, wanted: bool, alone: bool) -> _Echo:
    """`alone`: no output follows, to which bytes at the prompt's end would belong that are no whole character."""
    tokenizer = service.llm.tokenizer
    if not wanted or tokenizer is None:
        return _Echo(job.tokens)
    if job.prompt is not None and job.params.truncate_prompt_tokens is None:
        text = job.prompt
    elif alone:
        text = tokenizer.decode(job.tokens, skip_special_tokens=False)
    else:
        text = prompt_text(tokenizer, job.tokens)
    if job.params.logprobs is None:
        return _Echo(job.tokens, wanted, text)
    first = legacy_name(tokenizer.token_text(job.tokens[0]), tokenizer.token_bytes(job.tokens[0]))
    return _Echo(job.tokens, wanted, text, first, prompt_offsets(tokenizer, job.tokens, text))


# --- at once -------------------------------------------------------------------------------------------------------


def _answer(asked: _CompletionRequest, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    n = asked.params.n
    choices = [
        _choice(asked, output, each, asked.echoes[i]) | {"index": i * n + each.index}
        for i, output in enumerate(outputs)
        for each in output.outputs
    ]
    written = 0 if asked.empty else sum(len(each.token_ids) for output in outputs for each in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {
        "id": asked.id,
        "object": "text_completion",
        "created": asked.created,
        "model": asked.model,
        "choices": choices,
        "usage": _usage(asked, written, cached),
    }


def _weight(asked: _CompletionRequest, outputs: Sequence[RequestOutput]) -> int:
    written = sum(len(each.token_ids) for output in outputs for each in output.outputs)
    read = sum(len(output.prompt_token_ids) * len(output.outputs) for output in outputs)
    prompt = weight_of(read, asked.params.prompt_logprobs) if asked.params.prompt_logprobs is not None else 0
    return weight_of(written, asked.params.logprobs) + prompt


def _choice(asked: _CompletionRequest, output: RequestOutput, each: CompletionOutput, echo: _Echo) -> dict[str, Any]:
    if asked.empty:
        each = replace(each, text="", token_ids=(), finish_reason="length", stop_reason=None)
        each = replace(each, logprobs=None if each.logprobs is None else ())
    by_id = asked.forms.named_by_id
    choice = completion_choice(each, by_id=by_id, make_list=EncodedList)
    choice["text"] = echo.text + choice["text"]
    if echo.wanted and each.logprobs is not None:
        offsets = choice["logprobs"]["text_offset"]
        choice["logprobs"] = _joined(
            echo, output.prompt_logprobs or (), each.token_ids, each.logprobs, offsets, by_id=by_id
        )
    if asked.forms.ids:
        choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": each.token_ids}
    if asked.prompt_logprobs:
        choice["prompt_logprobs"] = positions(output.prompt_logprobs or (), EncodedList())
    return choice


def _joined(
    echo: _Echo,
    prompt: Sequence[Any],
    tokens: Sequence[int],
    logprobs: Sequence[Any],
    offsets: Sequence[int],
    *,
    by_id: bool,
) -> dict[str, Any]:
    """Of the prompt's tokens and the output's, as one list. `offsets`: of the latter, in their own text."""
    behind = [*echo.offsets, *(len(echo.text) + each for each in offsets)]
    return completion_logprobs(
        chain(echo.tokens, tokens),
        chain(prompt, logprobs),
        behind,
        first=echo.first,
        by_id=by_id,
        make_list=EncodedList,
    )


def _usage(asked: _CompletionRequest, written: int, cached: int) -> dict[str, Any]:
    found = usage(sum(len(job.tokens) for job in asked.jobs), written)
    return {**found, "prompt_tokens_details": {"cached_tokens": cached}}


# --- streaming -----------------------------------------------------------------------------------------------------


async def _events(asked: _CompletionRequest, streams: Sequence[TokenStream]) -> AsyncGenerator[bytes, None]:
    """The first one comes with the first tokens: until then, the request can be refused."""
    writer = ChunkWriter(id=asked.id, object="text_completion", created=asked.created, model=asked.model)
    n = asked.params.n
    count = len(streams) * n
    waiting = [TokenPositions() for _ in range(count)]
    begun = [False] * count
    held: list[list[Delta]] = [[] for _ in streams]
    written = 0
    no_usage = "null" if asked.usage else None
    try:
        async for number, deltas in merged(streams):
            held[number] += deltas
            has_begun = any(begun[number * n : (number + 1) * n])
            if not (has_begun or _may_begin(streams[number], held[number])):
                continue
            ready, held[number] = held[number], []

            def weight(delta: Delta, number: int = number) -> int:
                return _chunk_weight(asked, asked.jobs[number], delta, first=not begun[number * n + delta.index])

            def told_choices(part: Sequence[Delta], number: int = number) -> list[str]:
                choices = []
                for delta in part:
                    index = number * n + delta.index
                    choice = _chunk_choice(
                        asked, streams[number], delta, asked.echoes[number], waiting[index], first=not begun[index]
                    )
                    choice["index"] = index
                    begun[index] = True
                    if _says_something(choice):
                        choices.append("".join(pieces(choice)))
                return choices

            for part, size in parted(ready, weight):
                choices = await apart(partial(told_choices, part), size)
                written += 0 if asked.empty else sum(len(delta.token_ids) for delta in part)
                told = text_of(_usage(asked, written, _cached(streams))) if asked.usage_always else no_usage
                chunks = "".join([writer.chunk(choice, told) for choice in choices])
                if chunks:
                    yield chunks.encode("utf-8", "replace")
        if asked.usage:
            yield writer.chunk("", text_of(_usage(asked, written, _cached(streams)))).encode()
    finally:
        close(streams)


def _may_begin(stream: TokenStream, held: Sequence[Delta]) -> bool:
    """What is known of the prompt comes with its first output and is sent before each: the others wait for that one."""
    return stream.prompt_told or any(delta.index == 0 and delta.finish_reason is not None for delta in held)


def _chunk_weight(asked: _CompletionRequest, job: Job, delta: Delta, *, first: bool) -> int:
    """`first`: of its output, so that the prompt stands before it."""
    wanted = asked.params.prompt_logprobs
    prompt = weight_of(len(job.tokens), wanted) if first and wanted is not None else 0
    return prompt + weight_of(len(delta.token_ids), asked.params.logprobs)


def _says_something(choice: Mapping[str, Any]) -> bool:
    return bool(
        choice["text"]
        or choice["finish_reason"]
        or choice["logprobs"] is not None
        or "prompt_logprobs" in choice
        or choice.get("token_ids")
    )


def _cached(streams: Sequence[TokenStream]) -> int:
    return sum(stream.cached_tokens for stream in streams)


def _chunk_choice(
    asked: _CompletionRequest, stream: TokenStream, delta: Delta, echo: _Echo, waiting: TokenPositions, *, first: bool
) -> dict[str, Any]:
    """`first`: of its output, so that the prompt stands before it."""
    if asked.empty:
        finish: FinishReason | None = None if delta.finish_reason is None else "length"
        logprobs = None if delta.logprobs is None else ()
        delta = replace(delta, text="", token_ids=(), logprobs=logprobs, finish_reason=finish, stop_reason=None)
    found = None
    if delta.logprobs is not None:
        found = _ready_logprobs(waiting.take(delta), stream, echo, first=first, by_id=asked.forms.named_by_id)
    choice: dict[str, Any] = {
        "text": delta.text,
        "logprobs": found,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }
    if asked.forms.ids:
        choice["token_ids"] = delta.token_ids
    if first:
        choice["text"] = echo.text + delta.text
        if asked.forms.ids:
            choice["prompt_token_ids"] = echo.tokens
        if asked.prompt_logprobs:
            choice["prompt_logprobs"] = positions(stream.prompt_logprobs or (), EncodedList())
    return choice


def _ready_logprobs(
    ready: Sequence[tuple[int, Logprobs, int]], stream: TokenStream, echo: _Echo, *, first: bool, by_id: bool
) -> dict[str, Any]:
    tokens = [token for token, _, _ in ready]
    logprobs = [known for _, known, _ in ready]
    offsets = [offset for _, _, offset in ready]
    if first and echo.wanted:
        return _joined(echo, stream.prompt_logprobs or (), tokens, logprobs, offsets, by_id=by_id)
    behind = [len(echo.text) + each for each in offsets]
    return completion_logprobs(tokens, logprobs, behind, by_id=by_id, make_list=EncodedList)
