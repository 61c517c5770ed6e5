"""Answers that are sent while they are made, as server-sent events.

The format is that of https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.server.http.errors import refusal_of
from shoal.server.http.json_encoding import bytes_of, text_of

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
# Of an endpoint that answers so where it is asked to, for its description, which shows one event.
STREAMED: dict[str, Any] = {"content": {"text/event-stream": {"schema": _EVENT}}}
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class ChunkWriter:
    """Chunks of one answer, which have all but their choices in common."""

    def __init__(self, **common: Any) -> None:
        self._head = "data: " + text_of(common)[:-1] + ',"choices":['

    def chunk(self, choices: str, usage: str | None = None, more: str = "") -> str:
        """`choices`: in JSON, with commas between; `usage` likewise, "null" included; `more`: other fields, a comma
        before each."""
        end = f"{more}}}" if usage is None else f'{more},"usage":{usage}}}'
        return f"{self._head}{choices}]{end}\n\n"


class EventStream(Response):
    """`head`, then `events` until they end; closes them in any case. A client that goes away ends them at once.

    An error is sent as an event, which is the last one but for `last`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        head: bytes,
        events: AsyncGenerator[bytes, None],
        last: bytes = DONE,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={**_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._first = head
        self._events = events
        self._end = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        try:
            await unless_gone(receive, sending)
        except (ClientGone, OSError):
            pass
        finally:
            await self._events.aclose()
        if self.background is not None:
            await self.background()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - the status was sent: this is the only way to tell the client
            event = b"data: " + bytes_of(refusal_of(error).body()) + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": self._end, "more_body": False})


async def answered(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives, which is called off when the client goes away.

    Raises:
        ClientGone: it has.
    """
    return await unless_gone(request.receive, asyncio.create_task(work))


async def unless_gone(receive: Receive, work: asyncio.Task[T]) -> T:
    """The outcome of `work`; as `answered`."""
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.wait([work, gone])
        del work  # it holds the error, whose traceback holds this frame


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
