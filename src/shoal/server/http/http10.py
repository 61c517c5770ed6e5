"""Answers to HTTP/1.0 clients. They know no chunks: an answer of unknown length ends with its connection.

uvicorn answers every request as HTTP/1.1. See RFC 9112, 6.3 and 9.3, and its appendix C.2.2 for `keep-alive`.
"""

from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

VERSIONS = ("0.9", "1.0")
_WITHOUT_BODY = (204, 304)


class Http10:
    """Wraps an application so that it answers the one request of `cycle` in HTTP/1.0.

    The connection stays open if the client asked for that and the answer has a known length.
    """

    def __init__(self, app: ASGIApp, cycle: RequestResponseCycle) -> None:
        self._app = app
        self._cycle = cycle
        self._delimited = True
        cycle.waiting_for_100_continue = False  # an HTTP/1.0 client does not know status 100

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_http10(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = self._start(message)
            elif not self._delimited:
                self._cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await self._app(scope, receive, send_http10)

    def _start(self, message: Message) -> Message:
        cycle, headers = self._cycle, list(message.get("headers", ()))
        self._delimited = _has(headers, b"content-length") or message["status"] in _WITHOUT_BODY
        if not self._delimited:
            cycle.chunked_encoding = cycle.keep_alive = False
        if cycle.keep_alive and not _has(headers, b"connection"):
            headers.append((b"connection", b"keep-alive"))
        return {**message, "headers": headers}


def _has(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bool:
    return any(key.lower() == name for key, _ in headers)
