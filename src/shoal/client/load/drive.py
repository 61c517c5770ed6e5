"""Sending requests at their times, and measuring the answers."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp

from shoal.client.http import ServerClient, reason, said
from shoal.client.load.outcome import Failure, LoadOutcome
from shoal.client.load.stream import BadStream, Tally
from shoal.client.load.workload import Planned

Clock = Callable[[], float]


class Requester:
    """Makes bodies of requests and sends them, one call each.

    `extra`: fields that every request has besides its own.
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
        """Times count from now."""
        self._start = self._clock()
        self.chunks_by_second.clear()

    def now(self) -> float:
        return self._clock() - self._start

    async def send(self, request: Planned) -> LoadOutcome:
        """Never raises for what the server does."""
        sent = self.now()
        tally = Tally()
        failure = None
        try:
            failure = await self._stream(request, tally)
        except BadStream as error:
            failure = Failure(error.kind, str(error))
        except TimeoutError:
            failure = Failure("timeout", f"no end after {self._timeout:g} s and {tally.chunks} chunks")
        except aiohttp.ClientConnectorError as error:
            failure = Failure("no connection", reason(error))
        except (aiohttp.ClientError, OSError) as error:
            failure = Failure("connection lost", f"{reason(error)}, after {tally.chunks} chunks")
        return LoadOutcome(
            request,
            arrival=sent if request.arrival is None else request.arrival,
            sent=sent,
            ended=self.now(),
            first=tally.first,
            last=tally.last,
            stopped=tally.stopped,
            prompt_tokens=tally.prompt or 0,
            output_tokens=tally.chunks if tally.output is None else tally.output,
            counted=tally.output is not None,
            finish_reason=tally.finish_reason,
            gaps=tally.gaps,
            failure=failure,
        )

    async def _stream(self, request: Planned, tally: Tally) -> Failure | None:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url, data=self._body(request), headers=headers) as response:
            if response.status != 200:
                return Failure(f"HTTP {response.status}", said(await response.text(errors="replace")))
            async for data in response.content.iter_any():
                before = tally.chunks
                now = self.now()
                tally.feed(data, now)
                self.chunks_by_second[int(now)] += tally.chunks - before
            tally.close(self.now())
        return None

    def _body(self, request: Planned) -> bytes:
        fields = {**self._fields, "max_tokens": request.max_tokens}
        if self._chat:
            fields["messages"] = [{"role": "user", "content": request.prompt}]
        else:
            fields["prompt"] = request.prompt
        return json.dumps(fields).encode()


class LoadRun:
    """One run through a workload. `done` gets each outcome as it comes.

    A request with a time of arrival is sent then, whatever the answers before it do (an open loop), unless
    `max_concurrency` are under way: then it waits, and that counts as its latency. Requests without a time follow each
    other, `max_concurrency` at once (a closed loop), until `duration` seconds are over.
    """

    def __init__(
        self,
        requester: Requester,
        requests: Iterator[Planned],
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

    async def to_the_end(self, stop: asyncio.Event | None = None) -> bool:
        """False if `stop` was set before; what was under way then is broken off.

        What `done` raises ends the run.
        """
        self._requester.restart()
        main = asyncio.create_task(self._all())
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

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for request in self._requests:
                await self._turn(request)
                if request.arrival is None and self._requester.now() > self._duration:
                    return
                group.create_task(self._one(request))

    async def _turn(self, request: Planned) -> None:
        """Waits until the request is to be begun; one without a time has a place then."""
        if request.arrival is not None:
            await asyncio.sleep(max(0.0, request.arrival - self._requester.now()))
        elif self._places is not None:
            await self._places.acquire()

    async def _one(self, request: Planned) -> None:
        try:
            if self._places is not None and request.arrival is not None:
                await self._places.acquire()
            outcome = await self._send(request)
        except asyncio.CancelledError:  # be it under way, or overdue
            self.broken_off += 1
            raise
        self._done(outcome)

    async def _send(self, request: Planned) -> LoadOutcome:
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self._requester.send(request)
        finally:
            self.running -= 1
            if self._places is not None:
                self._places.release()
