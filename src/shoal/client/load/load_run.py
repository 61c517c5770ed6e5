"""Sending requests at their times of arrival, and measuring the answers."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp

from shoal.client.http import ServerClient, connection_error, error_message
from shoal.client.load.outcome import Failure, LoadOutcome
from shoal.client.load.streamed_answer import BrokenAnswer, StreamedAnswer
from shoal.client.load.workload import PlannedRequest

Clock = Callable[[], float]


class Requester:
    """Sends requests to a server and measures their answers.

    `extra`: fields that are added to the body of every request.
    """

    def __init__(
        self, client: ServerClient, *, chat: bool, model: str, extra: dict[str, Any], clock: Clock = time.perf_counter
    ) -> None:
        self._session = client.session
        self._url = client.url + ("/v1/chat/completions" if chat else "/v1/completions")
        self._timeout = client.timeout
        self._chat = chat
        self._fields = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **extra}
        self._clock = clock
        self._start = clock()
        self.chunks_by_second: Counter[int] = Counter()

    def restart(self) -> None:
        """Count times from now on."""
        self._start = self._clock()
        self.chunks_by_second.clear()

    def now(self) -> float:
        return self._clock() - self._start

    async def send(self, request: PlannedRequest) -> LoadOutcome:
        """Send a request and read its answer. A failure is part of the outcome and raises nothing."""
        sent = self.now()
        answer = StreamedAnswer()
        failure = None
        try:
            failure = await self._stream(request, answer)
        except BrokenAnswer as error:
            failure = Failure(error.kind, str(error))
        except TimeoutError:
            failure = Failure("timeout", f"not complete after {self._timeout:g} s and {answer.chunks} chunks")
        except aiohttp.ClientConnectorError as error:
            failure = Failure("no connection", connection_error(error))
        except (aiohttp.ClientError, OSError) as error:
            failure = Failure("connection lost", f"{connection_error(error)}, after {answer.chunks} chunks")
        return LoadOutcome(
            request,
            arrival=sent if request.arrival is None else request.arrival,
            sent=sent,
            ended=self.now(),
            first=answer.first,
            last=answer.last,
            stopped=answer.stopped,
            prompt_tokens=answer.prompt_tokens or 0,
            output_tokens=answer.chunks if answer.output_tokens is None else answer.output_tokens,
            counted=answer.output_tokens is not None,
            finish_reason=answer.finish_reason,
            gaps=answer.gaps,
            failure=failure,
        )

    async def _stream(self, request: PlannedRequest, answer: StreamedAnswer) -> Failure | None:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=self._body(request), headers=headers) as response:
            if response.status != 200:
                return Failure(f"HTTP {response.status}", error_message(await response.text(errors="replace")))
            async for data in response.content.iter_any():
                before = answer.chunks
                now = self.now()
                answer.feed(data, now)
                self.chunks_by_second[int(now)] += answer.chunks - before
            answer.close(self.now())
        return None

    def _body(self, request: PlannedRequest) -> bytes:
        fields = {**self._fields, "max_tokens": request.max_tokens}
        if self._chat:
            fields["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            fields["prompt"] = request.prompt
        return json.dumps(fields).encode()


class LoadRun:
    """A run of a workload. `done` is called with each outcome.

    A request with a time of arrival is sent at that time, even if earlier requests have no answer yet (an open loop).
    If `max_concurrency` requests are running, it waits, and the wait counts as latency. Requests without a time follow
    each other, with `max_concurrency` at once (a closed loop), until `duration` seconds are over.
    """

    def __init__(
        self,
        requester: Requester,
        requests: Iterator[PlannedRequest],
        done: Callable[[LoadOutcome], None],
        *,
        max_concurrency: int | None = None,
        duration: float | None = None,
    ) -> None:
        self._requester = requester
        self._requests = requests
        self._done = done
        self._places = None if max_concurrency is None else asyncio.Semaphore(max_concurrency)
        self._duration = float("inf") if duration is None else duration
        self.running = 0
        self.peak = 0
        self.broken_off = 0

    async def run(self, stop: asyncio.Event | None = None) -> bool:
        """Send all requests and wait for their answers. Return whether the run was completed.

        If `stop` is set, running requests are broken off, and the result is False. An error that `done` raises ends
        the run.
        """
        self._requester.restart()
        main = asyncio.create_task(self._send_all())
        stopped = asyncio.create_task((stop or asyncio.Event()).wait())
        try:
            await asyncio.wait({main, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if main.done():
                await main
                return True
            return False
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for task in (main, stopped):
                task.cancel()
            await asyncio.gather(main, stopped, return_exceptions=True)

    async def _send_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for request in self._requests:
                await self._wait_for_start(request)
                if request.arrival is None and self._requester.now() > self._duration:
                    return
                group.create_task(self._run_request(request))

    async def _wait_for_start(self, request: PlannedRequest) -> None:
        """Wait until it is time for the request. Without a time of arrival, wait for a place and take it."""
        if request.arrival is not None:
            await asyncio.sleep(max(0.0, request.arrival - self._requester.now()))
        elif self._places is not None:
            await self._places.acquire()

    async def _run_request(self, request: PlannedRequest) -> None:
        try:
            if self._places is not None and request.arrival is not None:
                await self._places.acquire()
            outcome = await self._send(request)
        except asyncio.CancelledError:  # whether it was sent or waited for a place
            self.broken_off += 1
            raise
        self._done(outcome)

    async def _send(self, request: PlannedRequest) -> LoadOutcome:
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self._requester.send(request)
        finally:
            self.running -= 1
            if self._places is not None:
                self._places.release()
