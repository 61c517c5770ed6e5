"""The streams of outputs of one request: begun together, and read one by one, at their ends, or merged."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

from shoal.llm.deltas import Delta
from shoal.outputs import RequestOutput
from shoal.server.api.request_schemas import GenerationFields
from shoal.server.api.service import RequestPlacement, Service
from shoal.server.backend import Backend, TokenStream
from shoal.server.http import request_ids
from shoal.text.prompts import Job

_OUTPUTS_IN_A_ROW = 64  # outputs that begin before other requests are served; a prompt with more begins as a whole
_PART_BYTES = 256 << 10  # size of the parts in which a stream is made


async def check_grammars(llm: Backend, jobs: Sequence[Job]) -> None:
    """Check that the structured outputs of all jobs can be obeyed.

    Raises:
        RequestError: one of them can't be.
        EngineError: too many grammars wait to be checked already.
    """
    for job in {job.grammar: job for job in jobs if job.grammar}.values():
        await llm.check_grammar(job)


async def begin(service: Service, jobs: Sequence[Job], place: RequestPlacement) -> list[TokenStream]:
    """Begin the streams of all jobs; if one can't begin, none does.

    While many begin, other requests are served in between. Requests that also have many outputs wait for each other.
    """
    outputs = sum(job.params.n for job in jobs)
    streams: list[TokenStream] = []
    try:
        async with service.large_requests if outputs > _OUTPUTS_IN_A_ROW else nullcontext():
            for number, job in enumerate(jobs, 1):
                own = replace(job, outputs=outputs)
                stream = service.llm.stream(
                    own, priority=place.priority, replica=place.replica, name=request_ids.current.get()
                )
                streams.append(stream)
                if number * job.params.n % _OUTPUTS_IN_A_ROW == 0:
                    await asyncio.sleep(0)
    except BaseException:
        close(streams)
        raise
    return streams


def close(streams: Sequence[TokenStream]) -> None:
    for stream in streams:
        stream.close()


async def finished(streams: Sequence[TokenStream]) -> list[RequestOutput]:
    """Wait for the ends of all streams, and return their outputs. If one fails, the others are closed."""
    try:
        if len(streams) == 1:
            return [await streams[0].wait()]
        async with _TaskGroup() as tasks:
            return await tasks.all([stream.wait() for stream in streams])
    finally:
        close(streams)


async def merged(streams: Sequence[TokenStream]) -> AsyncGenerator[tuple[int, Sequence[Delta]], None]:
    """Yield (number of the stream, deltas) as they come.

    A slow reader gets fewer and larger deltas, so that nothing piles up.
    """
    if len(streams) == 1:
        async for deltas in streams[0]:
            yield 0, deltas
        return
    queue: asyncio.Queue[tuple[int, Sequence[Delta]] | None] = asyncio.Queue(len(streams))

    async def pump(number: int) -> None:
        async for deltas in streams[number]:
            await queue.put((number, deltas))

    async with _TaskGroup() as tasks:

        async def pump_all() -> None:
            try:
                await tasks.all([pump(number) for number in range(len(streams))])
            finally:
                over.set()
                with suppress(asyncio.QueueFull):  # wakes a reader that waits for more
                    queue.put_nowait(None)

        over = asyncio.Event()
        pumping = tasks.start(pump_all())
        while not (over.is_set() and queue.empty()):
            item = await queue.get()
            if item is not None:
                yield item
        await pumping


class _TaskGroup:
    """Tasks that are cancelled when the block ends. (`asyncio.TaskGroup` would wrap their errors in a group.)"""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task

    async def all(self, works: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Return all results.

        Raises:
            Exception: the first error of any of them.
        """
        return list(await asyncio.gather(*(self.start(work) for work in works)))

    async def __aenter__(self) -> "_TaskGroup":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()  # a task holds its error, whose traceback holds this object


@dataclass(frozen=True, slots=True)
class TokenForms:
    """The forms in which an answer shows tokens, beside their text."""

    ids: bool  # as lists of the ids of the prompt and of the output
    named_by_id: bool  # in log-probabilities, as names like `token_id:17`

    @classmethod
    def of(cls, service: Service, body: GenerationFields) -> "TokenForms":
        named = body.return_tokens_as_token_ids
        default = service.settings.return_tokens_as_token_ids
        return cls(bool(body.return_token_ids), default if named is None else named)


def json_size(tokens: int, logprobs: int | None) -> int:
    """Return about how many bytes of JSON describe this many tokens, with so many of the likeliest ones at each."""
    return tokens * (8 + (0 if logprobs is None else 64 * (logprobs + 1)))


def in_parts(deltas: Sequence[Delta], size_of: Callable[[Delta], int]) -> Iterator[tuple[list[Delta], int]]:
    """Yield deltas in their order, in parts of at most `_PART_BYTES` (or of one delta), with the size of each part."""
    part: list[Delta] = []
    size = 0
    for delta in deltas:
        own = size_of(delta)
        if part and size + own > _PART_BYTES:
            yield part, size
            part, size = [], 0
        part.append(delta)
        size += own
    if part:
        yield part, size
