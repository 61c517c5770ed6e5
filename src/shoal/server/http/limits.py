"""Middleware in front of all endpoints: API keys, and limits on the size and the time of a request.

It is pure ASGI, so that a stream passes through without a task or a queue of its own.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.server.http.errors import HttpError
from shoal.server.settings import ServerSettings


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits on requests and connections. Times are in seconds.

    A body of 32 MiB holds four prompts of a million tokens each, as ids of six digits or as text with every character
    escaped; and a client with 5 Mbit/s sends it in time. Three bytes of JSON, `{},`, become an object of 72 bytes that
    the garbage collector must follow: so the number of values is limited too (to what four million ids need), and that
    of lists and objects (to what conversations of ten thousand messages need).
    """

    body_bytes: int = 32 << 20
    bodies_bytes: int = 256 << 20  # of all bodies that are being read at the same time
    body_values: int = 4 << 20
    body_containers: int = 1 << 17
    json_depth: int = 128
    body_s: float = 60.0
    header_bytes: int = 64 << 10  # of one request, its first line included
    headers: int = 128
    header_s: float = 15.0  # since a request's first byte, or since connecting
    write_s: float = 120.0  # in which a client must read some of what waits for it
    discarded_bytes: int = 256 << 20  # of a body that is no longer read, before the connection is closed
    linger_s: float = 2.0  # for a client to read why its connection ends
    pipelined: int = 16  # requests that may wait on one connection for the answer to an earlier one
    idle_connections: int = 1024
    connections: int = 8192


PUBLIC = frozenset({"/health", "/ready", "/metrics", "/version", "/dashboard"})  # paths that need no key


def add_limits(app: FastAPI, settings: ServerSettings, limits: RequestLimits | None = None) -> None:
    """Add the middleware.

    Keys are checked before a body is read. Web pages of `allowed_origins` can read error answers too.
    """
    app.add_middleware(BodyLimit, limits=limits or RequestLimits(body_bytes=settings.max_request_bytes))
    if settings.api_keys:
        app.add_middleware(KeyCheck, keys=settings.api_keys)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )


class KeyCheck:
    """ASGI middleware that checks `Authorization: Bearer KEY` (RFC 6750).

    A wrong key takes the same time to check, however similar it is to the right one.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_of(scope) in PUBLIC or self._knows(_header(scope, b"authorization")):
            await self._app(scope, receive, send)
            return
        error = HttpError(401, "this server needs an API key: send it as `Authorization: Bearer KEY`")
        await error.response({"www-authenticate": "Bearer"})(scope, receive, send)

    def _knows(self, given: bytes | None) -> bool:
        scheme, _, key = (given or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = _digest(key.strip())
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0  # always compares all keys


class BodyLimit:
    """ASGI middleware that reads the whole body and passes it on in one piece.

    An endpoint that reads on after the body waits for the client to disconnect.
    """

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app = app
        self._limits = limits
        self._held = 0  # bytes of bodies that are being read

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            replay = await self._take(scope, receive)
        except HttpError as error:
            await error.response()(scope, receive, send)
            return
        if replay is not None:
            await self._app(scope, replay, send)

    async def _take(self, scope: Scope, receive: Receive) -> "_Replay | None":
        """Return a `receive` that gives the body again; None if the client has gone.

        Raises:
            HttpError: the body is too large, too slow, or in a form that can't be read.
        """
        body = await self._read(scope, receive)
        return None if body is None else _Replay(body, receive)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if the client has gone.

        Raises:
            HttpError: as `_take`.
        """
        if (_header(scope, b"content-encoding") or b"identity").lower() != b"identity":
            raise HttpError(415, "a body with a content-encoding can't be read: send it without compression")
        self._check_size(int(_header(scope, b"content-length") or 0))
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    parts.append(part)
                    size += len(part)
                    self._held += len(part)
                    self._check_size(size)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise HttpError(408, f"the body did not arrive within {self._limits.body_s:g} s") from None
        finally:
            self._held -= size

    def _check_size(self, size: int) -> None:
        most = self._limits.body_bytes
        if size > most:
            raise HttpError(
                413, f"a body may have at most {most} bytes, this one has {size} or more: send fewer or shorter prompts"
            )
        if self._held > self._limits.bodies_bytes:
            raise HttpError(503, "too many large requests are being read: try again", retry_after=1.0)


class _Replay:
    """A `receive` that gives a body that was read already, and then whatever follows.

    It does not keep the body after that, since an answer may take minutes.
    """

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _header(scope: Mapping[str, object], name: bytes) -> bytes | None:
    headers = scope["headers"]
    assert isinstance(headers, list)
    return next((value for key, value in headers if key == name), None)


def route_of(scope: Scope) -> str:
    """Return the path of a request without the prefix under which a proxy serves us (`--root-path`)."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
