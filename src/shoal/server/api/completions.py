"""The endpoint /v1/completions: the continuation of a text."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from shoal.errors import RequestError
from shoal.llm.deltas import Delta
from shoal.openai.answers import completion_choice, completion_logprobs, legacy_name, logprobs_by_id, usage
from shoal.outputs import CompletionOutput, FinishReason, Logprobs, RequestOutput
from shoal.params import Prompt, SamplingParams
from shoal.server.api import body_reader
from shoal.server.api.answer_schemas import CompletionAnswer
from shoal.server.api.output_streams import (
    TokenForms,
    begin,
    check_grammars,
    close,
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
from shoal.server.api.request_schemas import MAX_OUTPUTS, CompletionBody
from shoal.server.api.service import RankHeader, RequestPlacement, Service, new_id, respond
from shoal.server.api.token_positions import TokenPositions
from shoal.server.backend import TokenStream
from shoal.server.http.errors import GENERATION_ERRORS, named_by_client
from shoal.server.http.event_streams import STREAM_DESCRIPTION, ChunkWriter, EventStream, while_connected
from shoal.server.http.json_encoding import EncodedList, json_pieces, json_text
from shoal.server.http.work_threads import off_loop
from shoal.text.prompts import Job, salted
from shoal.text.token_offsets import prompt_offsets, prompt_text
from shoal.values import shown


@dataclass(frozen=True, slots=True)
class _CompletionRequest:
    """The contents of a request, read and checked."""

    id: str
    created: int
    model: str
    jobs: Sequence[Job]  # one for each prompt
    echoes: Sequence["_Echo"]  # one for each prompt
    params: SamplingParams
    names: Mapping[str, str]  # our names of parameters -> the client's names, where they differ
    empty: bool  # max_tokens is 0: only the prompt is wanted
    prompt_logprobs: bool  # the field `prompt_logprobs` asks for them
    forms: TokenForms
    usage: bool  # a last chunk has the usage
    usage_in_all: bool  # every other chunk has it too


@dataclass(frozen=True, slots=True)
class _Echo:
    """A prompt that is shown before its outputs, if that is `wanted`."""

    tokens: tuple[int, ...]
    wanted: bool = False
    text: str = ""
    first: str = ""  # the name of its first token
    offsets: Sequence[int] = ()  # where its tokens begin in `text`, if log-probabilities are wanted


def routes(service: Service) -> APIRouter:
    router = body_reader.router("OpenAI")

    @router.post(
        "/v1/completions",
        responses={200: {"model": CompletionAnswer, **STREAM_DESCRIPTION}, **GENERATION_ERRORS},
        response_class=Response,
    )
    async def create_completion(body: CompletionBody, request: Request, rank: RankHeader = None) -> Response:
        """Continue each prompt `n` times. Choices are numbered prompt by prompt."""
        return await while_connected(request, _complete(service, body, RequestPlacement.of(body, rank)))

    return router


async def _complete(service: Service, body: CompletionBody, place: RequestPlacement) -> Response:
    asked = await read_apart(partial(_read, service, body), body)
    with named_by_client(asked.names):
        await check_grammars(service.llm, asked.jobs)
        streams = await begin(service, asked.jobs, place)
        if not body.stream:
            outputs = await finished(streams)
            make, size = partial(_answer, asked, outputs), _answer_size(asked, outputs)
            return await respond(make, size, ignored_headers(asked.jobs))
        events = _events(asked, streams)
        return EventStream(await anext(events), events, headers=ignored_headers(asked.jobs))


def _read(service: Service, body: CompletionBody) -> _CompletionRequest:
    """Return what a body asks for.

    Raises:
        RequestError, HttpError: it asks for something that it can't get.
    """
    model = service.model(body.model)
    usage_wanted, usage_in_all = stream_usage(body)
    given = body.given()
    empty = body.max_tokens == 0
    if empty and not body.echo:
        raise RequestError("max_tokens must be at least 1, or 0 together with echo, got 0", "max_tokens")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported: leave it out, and choose among n outputs", "best_of")
    prompts = _prompts(body.prompt)
    given |= {"max_tokens": 1} if empty else {}
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        given["prompt_logprobs"] = body.logprobs
    names = client_names(given, "completions")
    params = sampling_params(service, given, names, chat=False, read=("echo", "best_of", "add_special_tokens"))
    check_outputs(len(prompts), params)
    jobs = []
    for i, prompt in enumerate(prompts):
        with named_by_client(names | ({"prompt": f"prompt[{i}]"} if len(prompts) > 1 else {})):
            salted_prompt = salted(prompt, body.cache_salt)
            specials = body.add_special_tokens is not False
            jobs.append(service.llm.prepare(salted_prompt, params, add_special_tokens=specials))
    check_tokens(jobs, params)
    return _CompletionRequest(
        id=new_id("cmpl", body.request_id),
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
        usage_in_all=usage_in_all,
    )


def _prompts(given: Any) -> list[Prompt]:
    """Return the prompts of a body: one text, one list of token ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        why = (
            f"prompt must be a string, a list of texts, a list of token ids or a list of such lists, got {shown(given)}"
        )
        raise RequestError(why, "prompt")
    if _is_id(given[0]):
        return [{"prompt_token_ids": given}]
    if len(given) > MAX_OUTPUTS:
        why = f"a request may have {MAX_OUTPUTS} outputs, got {len(given)} prompts: send several"
        raise RequestError(why, "prompt")
    return [_prompt(each, f"prompt[{i}]") for i, each in enumerate(given)]


def _prompt(each: Any, where: str) -> Any:
    if isinstance(each, str):
        return each
    if isinstance(each, list):
        return {"prompt_token_ids": each}
    raise RequestError(f"{where} must be a string or a list of token ids, got {shown(each)}", where)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _echo(service: Service, job: Job, *, wanted: bool, alone: bool) -> _Echo:
    """Return how a prompt is shown.

    Args:
        alone: no output follows. (An output could complete a character that the prompt begins.)
    """
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


# --- answers without a stream --------------------------------------------------------------------------------------


def _answer(asked: _CompletionRequest, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    n = asked.params.n
    choices = [
        _choice(asked, output, each, asked.echoes[i]) | {"index": i * n + each.index}
        for i, output in enumerate(outputs)
        for each in output.outputs
    ]
    output_tokens = 0 if asked.empty else sum(len(each.token_ids) for output in outputs for each in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {
        "id": asked.id,
        "object": "text_completion",
        "created": asked.created,
        "model": asked.model,
        "choices": choices,
        "usage": _usage(asked, output_tokens, cached),
    }


def _answer_size(asked: _CompletionRequest, outputs: Sequence[RequestOutput]) -> int:
    output_tokens = sum(len(each.token_ids) for output in outputs for each in output.outputs)
    prompt_tokens = sum(len(output.prompt_token_ids) * len(output.outputs) for output in outputs)
    wanted = asked.params.prompt_logprobs
    return json_size(output_tokens, asked.params.logprobs) + (0 if wanted is None else json_size(prompt_tokens, wanted))


def _choice(asked: _CompletionRequest, output: RequestOutput, each: CompletionOutput, echo: _Echo) -> dict[str, Any]:
    if asked.empty:
        each = replace(each, text="", token_ids=(), finish_reason="length", stop_reason=None)
        each = replace(each, logprobs=None if each.logprobs is None else ())
    by_id = asked.forms.named_by_id
    choice = completion_choice(each, by_id=by_id, make_list=EncodedList)
    choice["text"] = echo.text + choice["text"]
    if echo.wanted and each.logprobs is not None:
        offsets = choice["logprobs"]["text_offset"]
        choice["logprobs"] = _with_echo(
            echo, output.prompt_logprobs or (), each.token_ids, each.logprobs, offsets, by_id=by_id
        )
    if asked.forms.ids:
        choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": each.token_ids}
    if asked.prompt_logprobs:
        choice["prompt_logprobs"] = logprobs_by_id(output.prompt_logprobs or (), EncodedList())
    return choice


def _with_echo(
    echo: _Echo,
    prompt: Sequence[Any],
    tokens: Sequence[int],
    logprobs: Sequence[Any],
    offsets: Sequence[int],
    *,
    by_id: bool,
) -> dict[str, Any]:
    """Return the log-probabilities of a prompt and its output as one list.

    Args:
        offsets: where the tokens of the output begin in its own text.
    """
    all_offsets = [*echo.offsets, *(len(echo.text) + each for each in offsets)]
    return completion_logprobs(
        chain(echo.tokens, tokens),
        chain(prompt, logprobs),
        all_offsets,
        first=echo.first,
        by_id=by_id,
        make_list=EncodedList,
    )


def _usage(asked: _CompletionRequest, output_tokens: int, cached: int) -> dict[str, Any]:
    found = usage(sum(len(job.tokens) for job in asked.jobs), output_tokens)
    return {**found, "prompt_tokens_details": {"cached_tokens": cached}}


# --- streams -------------------------------------------------------------------------------------------------------


async def _events(asked: _CompletionRequest, streams: Sequence[TokenStream]) -> AsyncGenerator[bytes, None]:
    """Yield the events of a stream. The first one comes with the first tokens: until then an error can be a status."""
    writer = ChunkWriter(id=asked.id, object="text_completion", created=asked.created, model=asked.model)
    n = asked.params.n
    count = len(streams) * n
    waiting = [TokenPositions() for _ in range(count)]
    begun = [False] * count
    held: list[list[Delta]] = [[] for _ in streams]
    output_tokens = 0
    no_usage = "null" if asked.usage else None

    def size_of(number: int, delta: Delta) -> int:
        return _delta_size(asked, asked.jobs[number], delta, first=not begun[number * n + delta.index])

    def encoded_choices(number: int, part: Sequence[Delta]) -> list[str]:
        choices = []
        for delta in part:
            index = number * n + delta.index
            choice = _chunk_choice(
                asked, streams[number], delta, asked.echoes[number], waiting[index], first=not begun[index]
            )
            choice["index"] = index
            begun[index] = True
            if _has_content(choice):
                choices.append("".join(json_pieces(choice)))
        return choices

    try:
        with named_by_client(asked.names):
            async for number, deltas in merged(streams):
                held[number] += deltas
                has_begun = any(begun[number * n : (number + 1) * n])
                if not (has_begun or _may_begin(streams[number], held[number])):
                    continue
                ready, held[number] = held[number], []
                for part, size in in_parts(ready, partial(size_of, number)):
                    choices = await off_loop(partial(encoded_choices, number, part), size)
                    output_tokens += 0 if asked.empty else sum(len(delta.token_ids) for delta in part)
                    used = no_usage
                    if asked.usage_in_all:
                        used = json_text(_usage(asked, output_tokens, _cached(streams)))
                    chunks = "".join([writer.chunk(choice, used) for choice in choices])
                    if chunks:
                        yield chunks.encode("utf-8", "replace")
        if asked.usage:
            yield writer.chunk("", json_text(_usage(asked, output_tokens, _cached(streams)))).encode()
    finally:
        close(streams)


def _may_begin(stream: TokenStream, held: Sequence[Delta]) -> bool:
    """Return whether the outputs of a prompt may be sent.

    Log-probabilities of the prompt come with its first output, and are sent before each: so the others wait for it.
    """
    return stream.prompt_complete or any(delta.index == 0 and delta.finish_reason is not None for delta in held)


def _delta_size(asked: _CompletionRequest, job: Job, delta: Delta, *, first: bool) -> int:
    """Return about how many bytes a delta takes. `first`: it is the first of its output, sent after the prompt."""
    wanted = asked.params.prompt_logprobs
    prompt = json_size(len(job.tokens), wanted) if first and wanted is not None else 0
    return prompt + json_size(len(delta.token_ids), asked.params.logprobs)


def _has_content(choice: Mapping[str, Any]) -> bool:
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
    """Return the choice of one delta. `first`: it is the first of its output, sent after the prompt."""
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
            choice["prompt_logprobs"] = logprobs_by_id(stream.prompt_logprobs or (), EncodedList())
    return choice


def _ready_logprobs(
    ready: Sequence[tuple[int, Logprobs, int]], stream: TokenStream, echo: _Echo, *, first: bool, by_id: bool
) -> dict[str, Any]:
    tokens = [token for token, _, _ in ready]
    logprobs = [known for _, known, _ in ready]
    offsets = [offset for _, _, offset in ready]
    if first and echo.wanted:
        return _with_echo(echo, stream.prompt_logprobs or (), tokens, logprobs, offsets, by_id=by_id)
    all_offsets = [len(echo.text) + each for each in offsets]
    return completion_logprobs(tokens, logprobs, all_offsets, by_id=by_id, make_list=EncodedList)
