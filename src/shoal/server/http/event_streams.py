"""Answers that are sent as server-sent events while they are generated.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from shoal.server.http.errors import http_error
from shoal.server.http.json_encoding import json_bytes, json_text

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
# The description (OpenAPI) of an endpoint that can answer with events; it shows one event.
STREAM_DESCRIPTION: dict[str, Any] = {"content": {"text/event-stream": {"schema": _EVENT}}}
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientDisconnected(Exception):
    """The client has disconnected: no client waits for the answer."""


class ChunkWriter:
    """Writes the chunks of one answer. They have all fields in common but `choices` and `usage`."""

    def __init__(self, **common: Any) -> None:
        self._head = "data: " + json_text(common)[:-1] + ',"choices":['

    def chunk(self, choices: str, usage: str | None = None, more: str = "") -> str:
        """Return one event. All arguments are JSON.

        Args:
            choices: choices, joined by commas.
            usage: may be "null"; None: the chunk has no such field.
            more: other fields, each with a comma before it.
        """
        end = f"{more}}}" if usage is None else f'{more},"usage":{usage}}}'
        return f"{self._head}{choices}]{end}\n\n"


class EventStream(Response):
    """A response of `head`, then `events`, then `last`.

    The generator of `events` is closed in any case, and immediately when the client disconnects. An error becomes an
    event of its own before `last`.
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
        except (ClientDisconnected, OSError):
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
        except Exception as error:  # noqa: BLE001 - the status was sent already: only an event is left
            event = b"data: " + json_bytes(http_error(error).body()) + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": self._end, "more_body": False})


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the outcome of `work`, which is cancelled when the client disconnects.

    Raises:
        ClientDisconnected: it has disconnected.
    """
    return await unless_gone(request.receive, asyncio.create_task(work))


async def unless_gone(receive: Receive, work: asyncio.Task[T]) -> T:
    """Return the outcome of `work`, as `while_connected` does."""
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnected
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.wait([work, gone])
        del work  # it holds the error, whose traceback holds this frame


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
