"""What a request may be before anything is made of it: whose it is, how large, how slow, how deep.

Pure ASGI, so that a stream passes through without a task or a queue of its own.
"""

import asyncio
import hashlib
import hmac
import json
import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.server.errors import Refusal
from shoal.server.memory import Tidier
from shoal.server.settings import ServerSettings
from shoal.types import shown


@dataclass(frozen=True, slots=True)
class Limits:
    """Times are in seconds.

    A body of 32 MiB holds four prompts of a million tokens each, be they ids of six digits or text in which every
    character is escaped; and at 5 Mbit/s it is read in time. What three bytes say, `{},`, takes 72 when it is read,
    and is a burden to the garbage collector: so values are bounded too, by what four million ids need, and lists and
    objects, by what conversations of ten thousand messages need.
    """

    body_bytes: int = 32 << 20
    bodies_bytes: int = 256 << 20  # of all that are being read
    body_values: int = 4 << 20
    body_containers: int = 1 << 17
    json_depth: int = 128
    body_s: float = 60.0
    header_bytes: int = 64 << 10  # of a request, its first line included
    headers: int = 128
    header_s: float = 15.0  # from its first byte; from connecting, for a connection's first
    write_s: float = 120.0  # in which a client takes some of what waits for it
    discarded_bytes: int = 256 << 20  # of a body that nobody reads any more, before the connection is cut
    linger_s: float = 2.0  # for a client to read why it is cut
    pipelined: int = 16  # requests that may wait for the one before on their connection
    idle_connections: int = 1024
    connections: int = 8192


_LARGE_BYTES = 8 << 10
PUBLIC = frozenset({"/health", "/ready", "/metrics", "/version", "/dashboard"})  # where no key is asked for


def add_limits(app: FastAPI, settings: ServerSettings, limits: Limits | None = None) -> None:
    """The key is asked for before a body is read, and whatever is refused says so to web pages as well."""
    app.add_middleware(BodyLimit, limits=limits or Limits(body_bytes=settings.max_request_bytes))
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
    """`Authorization: Bearer KEY`, as RFC 6750 has it. The time a wrong key takes says nothing about the right ones."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_of(scope) in PUBLIC or self._knows(_header(scope, b"authorization")):
            await self._app(scope, receive, send)
            return
        refused = Refusal(401, "this server asks for an API key: send it as `Authorization: Bearer KEY`")
        await refused.response({"www-authenticate": "Bearer"})(scope, receive, send)

    def _knows(self, given: bytes | None) -> bool:
        scheme, _, key = (given or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        digest = _digest(key.strip())
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0  # all of them are compared


class BodyLimit:
    """Reads the body and hands it on in one piece. Whoever reads on behind it hears of the client's going."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._held = 0  # bytes of bodies that are being read
        self._tidier = Tidier()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            replay = await self._take(scope, receive)
        except Refusal as refused:
            self._tidier.soon()  # most of them are of large bodies
            await refused.response()(scope, receive, send)
            return
        if replay is not None:
            await self._app(scope, replay, send)
            if replay.size >= _LARGE_BYTES:
                self._tidier.soon()

    async def _take(self, scope: Scope, receive: Receive) -> "_Replay | None":
        """None: the client has gone.

        Raises:
            Refusal: the body can't be read, or must not be.
        """
        body = await self._read(scope, receive)
        if body:
            check_json(body, self._limits)
        return None if body is None else _Replay(body, receive)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """None: the client has gone.

        Raises:
            Refusal: it is too large, too slow, or in a form that can't be read.
        """
        if (_header(scope, b"content-encoding") or b"identity").lower() != b"identity":
            raise Refusal(415, "a body with a content-encoding can't be read: send it as it is")
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
            raise Refusal(408, f"the body did not come within {self._limits.body_s:g} s") from None
        finally:
            self._held -= size

    def _check_size(self, size: int) -> None:
        most = self._limits.body_bytes
        if size > most:
            raise Refusal(413, f"the body may have {most} bytes, and has {size} or more: send fewer or shorter prompts")
        if self._held > self._limits.bodies_bytes:
            raise Refusal(503, "too many large requests are being read: try again", retry_after=1.0)


def check_json(body: bytes, limits: Limits) -> None:
    """What JSON becomes is bounded before it is read: in size, and so deep that no reader of it runs out of stack.

    Raises:
        Refusal: it has more values, or is nested deeper, than `limits` allow; it is not UTF-8, or a text in it has no
            UTF-8 form; or it has a number that JSON, or a 64-bit float, does not have.
    """
    if b"\0" in body[:4] or body[:2] in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16 and UTF-32, which Python would read
        raise Refusal(400, "the body must be UTF-8", code="invalid_json")
    opened = body.count(b"[") + body.count(b"{")
    if opened + body.count(b",") > limits.body_values:
        raise Refusal(413, f"the body has more than {limits.body_values} values: send fewer or shorter prompts")
    if opened > limits.body_containers and len(_brackets(body)) > 2 * limits.body_containers:
        raise Refusal(413, f"the body has more than {limits.body_containers} lists and objects: send fewer prompts")
    if opened > limits.json_depth and nesting(body) > limits.json_depth:
        raise Refusal(400, f"the body is nested deeper than {limits.json_depth} levels", code="invalid_json")
    _check_numbers(body)
    if _SURROGATE.search(body) and _PAIRED.match(body).end() < len(body):  # type: ignore[union-attr]
        _refuse_surrogates(body)


# An escape that stands for half of a character beyond U+FFFF; and a text in which each has its other half.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_PAIRED = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?:[^dD]|[dD][0-7])|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+",
    re.DOTALL,
)


def _refuse_surrogates(body: bytes) -> None:
    """Says which text has half of a character.

    Raises:
        Refusal: there is one.
    """
    try:
        pending: list[tuple[str, Any]] = [("", json.loads(body))]
    except (ValueError, RecursionError):
        return  # whoever reads it says what is wrong
    while pending:
        where, value = pending.pop()
        if isinstance(value, str) and (at := _half(value)) is not None:
            half = f"\\u{ord(value[at]):04x} at character {at}"
            why = f"{where or 'the body'} is not valid Unicode: {half} is half of a surrogate pair, without the other"
            raise Refusal(400, why, param=where or None)
        if isinstance(value, dict):
            if any(_half(key) is not None for key in value):
                raise Refusal(400, f"{where or 'the body'} has a name that is not valid Unicode", param=where or None)
            pending.extend((f"{where}.{key}" if where else key, each) for key, each in reversed(value.items()))
        elif isinstance(value, list):
            pending.extend((f"{where}[{i}]", each) for i, each in reversed(list(enumerate(value))))


def _half(text: str) -> int | None:
    """Where half of a character stands alone."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _check_numbers(body: bytes) -> None:
    """Python reads NaN, Infinity and 1e999, which no answer could repeat and no comparison finds out of a range.

    Raises:
        Refusal: there is one, outside of texts.
    """
    digits = body.translate(_DIGITS)
    if not (any(mark in body for mark in _NO_NUMBERS) or any(mark in digits for mark in _LONG_NUMBERS)):
        return
    for found in _NUMBER.finditer(_STRING.sub(b" ", body)):
        number = found[0]
        if not number.lstrip(b"-").isdigit() and not _is_finite(number):
            text = shown(number[:_SHOWN].decode())
            why = f"the body has the number {text}, which JSON or a 64-bit float does not have"
            raise Refusal(400, why, code="invalid_json")


def _is_finite(number: bytes) -> bool:
    try:
        return math.isfinite(float(number))
    except ValueError:  # it is no number at all, which is for the parser to say
        return True


_SHOWN = 40
_NO_NUMBERS = (b"NaN", b"Infinity")
_NUMBER = re.compile(rb"-?(?:NaN|Infinity|[0-9][0-9.eE+-]*)")
# Where each digit is a 0: an exponent of three digits, and as many digits as make a number too large for a float.
_LONG_NUMBERS = (b"e000", b"e+000", b"0" * 309)
_DIGITS = bytes.maketrans(b"123456789E", b"000000000e")

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKETS = b"[{]}"
_REST = bytes(set(range(256)) - set(_BRACKETS))
_STEPS = bytes.maketrans(_BRACKETS, b"\1\1\xff\xff")


def nesting(body: bytes) -> int:
    """How many brackets are open at once at most, be the text JSON or not."""
    steps = array("b", _brackets(body).translate(_STEPS))
    return max(accumulate(steps, initial=0))


def _brackets(body: bytes) -> bytes:
    """Those that are not in a text."""
    return _STRING.sub(b"", body).translate(None, _REST)


class _Replay:
    """Gives a body that was read, and then what comes behind it. It is kept no longer: an answer may take minutes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.size = len(body)
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
    """The path behind the one where a proxy has put the server."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
