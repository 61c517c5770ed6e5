"""A session with a server over HTTP. Its errors have one line with the address and the reason."""

import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from shoal.addresses import bracketed
from shoal.errors import ConfigError, EngineError, Unavailable, UserError

_SHOWN = 300  # the most characters of a server's error message that are shown


class NotFound(UserError):
    """The server has nothing at this path (404)."""


def base_url(url: str) -> str:
    """Return `http://host:port` for an address with or without scheme, and with or without `/v1` at its end.

    An IPv6 address must be in brackets, unless there is nothing else.

    Raises:
        ConfigError: `url` is not the address of a server.
    """
    full = url if "://" in url else f"http://{bracketed(url)}"
    try:
        parts = urlsplit(full)
        usable = parts.scheme in {"http", "https"} and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigError(f"{url!r} is not the address of a server; use the form http://HOST:PORT")
    return full.rstrip("/").removesuffix("/v1").rstrip("/")


class ServerClient:
    """A session with one server: `async with ServerClient(url, api_key=...) as client`.

    `timeout`: the most seconds that a call may take.

    Every call raises these errors, which name the URL and the reason:
        UserError: no server listens there, the key is wrong, path or model are unknown, or the request is refused.
        Unavailable: the server takes no requests at the moment (429, 503).
        EngineError: the server failed, did not answer in time, or closed the connection.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 30.0) -> None:
        self.url = base_url(url)
        self.timeout = timeout
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "ServerClient":
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self.timeout),
            connector=aiohttp.TCPConnector(limit=0),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The session of aiohttp, for calls that need more than JSON. It raises errors of aiohttp."""
        if self._session is None:
            raise EngineError("a ServerClient must be used inside `async with`")
        return self._session

    async def get_json(self, path: str) -> Any:
        """Return the JSON value at `path`, such as `/v1/models`."""
        return await self._json("GET", path, None)

    async def post_json(self, path: str, body: Any) -> Any:
        return await self._json("POST", path, body)

    async def get_text(self, path: str) -> str:
        with self._errors(path):
            async with self.session.get(self.url + path) as response:
                text = await response.text(errors="replace")
        self._check(path, response.status, response.headers, text)
        return text

    async def _json(self, method: str, path: str, body: Any) -> Any:
        with self._errors(path):
            async with self.session.request(method, self.url + path, json=body) as response:
                text = await response.text(errors="replace")
        self._check(path, response.status, response.headers, text)
        try:
            return json.loads(text)
        except ValueError:
            raise UserError(f"{self.url}{path} does not answer with JSON: is this the address of the server?") from None

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Raise errors of the connection inside as our errors."""
        try:
            yield
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            where = f"{self.url}{path}"
            if isinstance(error, TimeoutError):
                raise EngineError(f"{where} did not answer within {self.timeout:g} s") from None
            if isinstance(error, aiohttp.ClientConnectorError | aiohttp.InvalidURL):
                raise UserError(f"no server at {self.url}: {connection_error(error)}") from None
            raise EngineError(f"{where}: the connection was lost: {connection_error(error)}") from None

    def _check(self, path: str, status: int, headers: Mapping[str, str], text: str) -> None:
        if status < 400:
            return
        what = f"{self.url}{path} answers {status}: {error_message(text)}"
        if status in {401, 403}:
            raise UserError(f"{what}; give the server's key with --api-key")
        if status == 404:
            raise NotFound(what)
        if status in {429, 503}:
            raise Unavailable(what, _seconds(headers.get("Retry-After")))
        raise (UserError if status < 500 else EngineError)(what)


def error_message(text: str) -> str:
    """Return the message of an error's body as one line. The body is OpenAI's object, FastAPI's `detail`, or a text."""
    try:
        body = json.loads(text)
    except ValueError:
        body = text
    if isinstance(body, dict):
        inner = body.get("error", body.get("detail", body.get("message", body)))
        body = inner.get("message", inner) if isinstance(inner, dict) else inner
    line = " ".join((body if isinstance(body, str) else json.dumps(body)).split())
    return (line if len(line) <= _SHOWN else line[:_SHOWN] + "...") or "no message"


def connection_error(error: BaseException) -> str:
    """Describe an error of a connection in a few words."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, ssl.SSLError):
        return cause.reason or "TLS failed"
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return " ".join(str(cause).split()) or type(cause).__name__


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return 1.0
