"""From a body to streams: what all endpoints that have the model answer share."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from shoal.errors import RequestError
from shoal.llm.deltas import Delta
from shoal.openai import parameters
from shoal.outputs import RequestOutput
from shoal.params import SamplingParams
from shoal.server.api.schemas import MOST_OUTPUTS, GenerationFields, SamplingFields
from shoal.server.backend import Backend, TokenStream
from shoal.server.http.errors import Refusal, of_request
from shoal.server.http.json_encoding import bytes_of
from shoal.server.http.work_threads import apart
from shoal.server.settings import ServerSettings
from shoal.server.tools.choice import ToolPlan
from shoal.structured.schema.prepare import summarize_keywords
from shoal.text.prompts import Job
from shoal.values import shown, whole_number

T = TypeVar("T")
# Fields that take long, however short they are.
_SLOW = {"bad_words", "structured_outputs", "response_format", "tools", "text", "chat_template", *parameters.GUIDED}
_SEEN_TO = (
    "stream", "stream_options", "priority", "data_parallel_rank", "request_id", "cache_salt", "return_token_ids",
    "return_tokens_as_token_ids",
)  # fmt: skip
_IGNORED = "X-Shoal-Schema-Ignored"
_MOST_IGNORED = 1000  # characters
_MOST_RANK = 1 << 31
_MOST_TEXTS = 1024  # that are looked for in each output, and ...
_MOST_CHARACTERS = 1 << 16  # ... theirs together
# What all outputs of a request may have together: each is a request of its own to the engine.
_MOST_ALLOWED = 1 << 22  # entries of allowed_token_ids
_MOST_CHANGES = 1 << 20  # ... and of what changes single logits or is looked at for each token
_MOST_TOKENS = 1 << 25  # of their prompts
_TURN = 64  # outputs that begin in a row, where a prompt has no more
_PART = 256 << 10  # bytes of a stream that are made at a time


def _digits(value: Any) -> Any:
    """A header's number; pydantic would also take "1_0" and "+1"."""
    number = whole_number(value, canonical=True) if isinstance(value, str) else value
    if value is not None and number is None:
        raise PydanticCustomError("int_parsing", "input should be a valid integer")
    return number


RankHeader = Annotated[
    int | None,
    BeforeValidator(_digits),
    Header(
        alias="X-data-parallel-rank", ge=0, lt=_MOST_RANK, description="The replica that runs it: `data_parallel_rank`."
    ),
]


@dataclass(frozen=True, slots=True)
class Service:
    """What endpoints work with."""

    llm: Backend
    settings: ServerSettings
    started: int = field(default_factory=lambda: int(time.time()))
    beginning: asyncio.Lock = field(default_factory=asyncio.Lock)  # of a request with many outputs

    @property
    def names(self) -> tuple[str, ...]:
        return self.settings.served_model_names or (self.llm.model_name,)

    def model(self, asked: str | None) -> str:
        """What the answer calls the model.

        Raises:
            Refusal: it is not served.
        """
        if asked is None:
            return self.names[0]
        if asked not in self.names:
            why = f"the model {shown(asked)} is not served; there is {', '.join(self.names)}"
            raise Refusal(404, why, param="model", code="model_not_found")
        return asked


@dataclass(frozen=True, slots=True)
class RequestPlacement:
    """Where and when a request runs."""

    priority: int
    replica: int | None

    @classmethod
    def of(cls, body: SamplingFields, header: int | None) -> "RequestPlacement":
        """The body's field goes over the header."""
        return cls(body.priority or 0, header if body.data_parallel_rank is None else body.data_parallel_rank)


def params_of(
    service: Service,
    body: Mapping[str, Any],
    *,
    chat: bool,
    read: Collection[str] = (),
    plan: ToolPlan | None = None,
) -> SamplingParams:
    """
    Raises:
        Refusal: a parameter that can't be obeyed, or out of its range.
    """
    try:
        found = parameters.sampling_of(body, chat=chat, read=(*_SEEN_TO, *read))
        if plan is not None and plan.schema is not None:
            if "structured_outputs" in found:
                raise RequestError("`tool_choice` and a structured output don't go together: leave one out")
            found["structured_outputs"] = {"json": plan.schema, "strict": plan.strict}
        if plan is not None and plan.special_tokens:
            found["skip_special_tokens"] = False
        _check_texts(found)
        base = service.llm.default_sampling_params(parameters.defaults(chat=chat))
        params = SamplingParams.from_dict(found, base)
        _check_logprobs(params, service.settings.max_logprobs)
        return params
    except RequestError as error:
        raise of_request(error, names_of(body, chat=chat)) from None


def _check_texts(found: Mapping[str, Any]) -> None:
    for name in ("stop", "bad_words"):
        texts = found.get(name)
        texts = texts if isinstance(texts, list) else [texts]
        size = sum(len(text) for text in texts if isinstance(text, str))
        if len(texts) > _MOST_TEXTS or size > _MOST_CHARACTERS:
            raise RequestError(
                f"{name} may have {_MOST_TEXTS} texts with {_MOST_CHARACTERS} characters in all, "
                f"got {len(texts)} with {size}"
            )


def check_outputs(prompts: int, params: SamplingParams) -> None:
    """
    Raises:
        Refusal: there are more than one request may have, or they bring too much along.
    """
    outputs = prompts * params.n
    param = "n" if prompts == 1 else "prompt"
    if outputs > MOST_OUTPUTS:
        why = f"a request may have {MOST_OUTPUTS} outputs, got {prompts} prompts with n {params.n}: send several"
        raise Refusal(400, why, param=param)
    listed = {
        "allowed_token_ids": (len(params.allowed_token_ids or ()), _MOST_ALLOWED),
        "stop_token_ids": (len(params.stop_token_ids or ()), _MOST_CHANGES),
        "logit_bias": (len(params.logit_bias or ()), _MOST_CHANGES),
        "bad_words": (sum(map(len, params.bad_words or ())), _MOST_CHANGES),
    }
    for name, (size, most) in listed.items():
        if size * outputs > most:
            unit = "characters" if name == "bad_words" else "entries"
            why = (
                f"{name} may have {most} {unit} over all outputs of a request, got {size} for each of {outputs} "
                "outputs: send several requests, or shorten it"
            )
            raise Refusal(400, why, param=name)


def check_tokens(jobs: Sequence[Job], params: SamplingParams) -> None:
    """
    Raises:
        Refusal: the prompts of all outputs are more than one request may have.
    """
    tokens = sum(len(job.tokens) for job in jobs) * params.n
    if tokens > _MOST_TOKENS:
        why = f"a request may have prompts of {_MOST_TOKENS} tokens over all outputs, got {tokens}: send several"
        raise Refusal(400, why, param="n" if params.n > 1 else "prompt")


def _check_logprobs(params: SamplingParams, most: int) -> None:
    """Those of a whole vocabulary, at each token of a long prompt, would be gigabytes.

    Raises:
        RequestError: they are more than `most`.
    """
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None and most >= 0 and not 0 <= wanted <= most:
            raise RequestError(f"{name} may be {most} at most here, got {wanted}: see --max-logprobs")


def stream_usage(body: GenerationFields) -> tuple[bool, bool]:
    """Is usage told in a last chunk, and in every other one too?

    Raises:
        Refusal: options of a stream, without a stream.
    """
    options = body.stream_options
    if options is None:
        return False, False
    if not body.stream:
        raise Refusal(400, "stream_options needs stream to be true", param="stream_options")
    wanted = bool(options.include_usage)
    return wanted, wanted and bool(options.continuous_usage_stats)


def names_of(body: Mapping[str, Any], *, chat: bool) -> dict[str, str]:
    """Our names of parameters as this client wrote them."""
    found = {"logprobs": "top_logprobs"} if chat else {}
    if body.get("max_completion_tokens") is not None:
        found["max_tokens"] = "max_completion_tokens"
    if body.get("structured_outputs") is None:
        structured = ["response_format", *parameters.GUIDED, "text", "tools"]
        written = next((name for name in structured if body.get(name) is not None), None)
        found |= {} if written is None else {"structured_outputs": written}
    return found


async def apart_from_the_loop(work: Callable[[], T], body: SamplingFields) -> T:
    """What `work` makes of a body. It is done on another thread unless it takes no time."""
    return await apart(work, body.weight, quick=body.model_fields_set.isdisjoint(_SLOW))


def prepared(work: Callable[[], Job], *, names: Mapping[str, str], prompt: str) -> Job:
    """Runs `LLM.prepare` or the like. Whether its grammar can be obeyed takes `check_grammars` to find out.

    Args:
        names: our names of parameters as the client wrote them; `prompt`: what it calls the prompt.

    Raises:
        Refusal: the request can't be used.
    """
    try:
        return work()
    except RequestError as error:
        raise of_request(error, names, prompt=prompt, prepared=True) from None


def ignored_headers(jobs: Sequence[Job]) -> dict[str, str]:
    """What tells the client which keywords of its schema the answer may not obey."""
    ignored = tuple(dict.fromkeys(keyword for job in jobs for keyword in job.ignored_keywords))
    return {_IGNORED: summarize_keywords(ignored, _MOST_IGNORED)} if ignored else {}


async def check_grammars(llm: Backend, jobs: Sequence[Job], names: Mapping[str, str]) -> None:
    """Finds out whether what the jobs' outputs must look like can be obeyed. `names`: as for `prepared`.

    Raises:
        Refusal: it can't.
        EngineError: too many wait for that already.
    """
    try:
        for job in {job.grammar: job for job in jobs if job.grammar}.values():
            await llm.check_grammar(job)
    except RequestError as error:
        raise of_request(error, names, prepared=True) from None


async def begin(service: Service, jobs: Sequence[Job], place: RequestPlacement) -> list[TokenStream]:
    """Begin the streams of all jobs, or of none. While many begin, other requests are served in between; requests that
    also have many outputs begin one after the other."""
    outputs = sum(job.params.n for job in jobs)
    streams: list[TokenStream] = []
    try:
        async with service.beginning if outputs > _TURN else nullcontext():
            for number, job in enumerate(jobs, 1):
                own = replace(job, outputs=outputs)
                streams.append(service.llm.stream(own, priority=place.priority, replica=place.replica))
                if number * job.params.n % _TURN == 0:
                    await asyncio.sleep(0)
    except BaseException:
        close(streams)
        raise
    return streams


def close(streams: Sequence[TokenStream]) -> None:
    for stream in streams:
        stream.close()


async def finished(streams: Sequence[TokenStream]) -> list[RequestOutput]:
    """All to their ends. If one fails, the others are closed."""
    try:
        if len(streams) == 1:
            return [await streams[0].wait()]
        async with _Together() as together:
            return await together.all([stream.wait() for stream in streams])
    finally:
        close(streams)


async def merged(streams: Sequence[TokenStream]) -> AsyncGenerator[tuple[int, Sequence[Delta]], None]:
    """(number of the stream, deltas) as they come. Whoever asks slowly gets larger deltas, and nothing is piled up."""
    if len(streams) == 1:
        async for deltas in streams[0]:
            yield 0, deltas
        return
    queue: asyncio.Queue[tuple[int, Sequence[Delta]] | None] = asyncio.Queue(len(streams))

    async def pump(number: int) -> None:
        async for deltas in streams[number]:
            await queue.put((number, deltas))

    async with _Together() as together:

        async def pump_all() -> None:
            try:
                await together.all([pump(number) for number in range(len(streams))])
            finally:
                over.set()
                with suppress(asyncio.QueueFull):  # whoever waits for more hears that there is none
                    queue.put_nowait(None)

        over = asyncio.Event()
        pumping = together.start(pump_all())
        while not (over.is_set() and queue.empty()):
            item = await queue.get()
            if item is not None:
                yield item
        await pumping


class _Together:
    """Tasks that end with whoever began them."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    async def all(self, works: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """The outcomes, or the first failure."""
        return list(await asyncio.gather(*(self.start(work) for work in works)))

    async def __aenter__(self) -> "_Together":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()  # they hold an error, whose traceback leads here


def identifier(kind: str, asked: str | None = None) -> str:
    """`asked`: the request's own name."""
    return f"{kind}-{asked or uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class TokenForms:
    """How an answer shows tokens, beside their text."""

    ids: bool  # those of the prompt and of the output, as lists
    named_by_id: bool  # log-probabilities call a token `token_id:17`

    @classmethod
    def of(cls, service: Service, body: GenerationFields) -> "TokenForms":
        named = body.return_tokens_as_token_ids
        default = service.settings.return_tokens_as_token_ids
        return cls(bool(body.return_token_ids), default if named is None else named)


def weight_of(tokens: int, logprobs: int | None) -> int:
    """About how many bytes tell of so many tokens, and of the likeliest ones at each."""
    return tokens * (8 + (0 if logprobs is None else 64 * (logprobs + 1)))


def parted(deltas: Sequence[Delta], weight: Callable[[Delta], int]) -> Iterator[tuple[list[Delta], int]]:
    """Yield deltas in their order, in parts of at most `_PART` bytes (or one delta), with the weight of each part."""
    part: list[Delta] = []
    size = 0
    for delta in deltas:
        own = weight(delta)
        if part and size + own > _PART:
            yield part, size
            part, size = [], 0
        part.append(delta)
        size += own
    if part:
        yield part, size


async def respond(make: Callable[[], Any], weight: int, headers: Mapping[str, str] | None = None) -> Response:
    """`make` gives the answer, which has about so many bytes."""
    return await apart(lambda: answer_of(make(), headers), weight)


def answer_of(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    return Response(bytes_of(value), headers=dict(headers or {}), media_type="application/json")


def client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)
