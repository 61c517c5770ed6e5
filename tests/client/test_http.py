"""Addresses of servers, and errors of one line."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from shoal.client.http import NotFound, ServerClient, base_url, error_message
from shoal.errors import ConfigError, EngineError, ShoalError, Unavailable, UserError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://a:1", "http://a:1"),
        ("a:1", "http://a:1"),
        ("localhost", "http://localhost"),
        ("https://a/v1/", "https://a"),
        ("http://a:1/some/root/v1", "http://a:1/some/root"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_base_urls(given: str, meant: str) -> None:
    assert base_url(given) == meant


@pytest.mark.parametrize(
    "given", ["", "ftp://a", "http://", "http://a:x", "a:99999", "http://a:0", "http://a?b", "http://[::1"]
)
def test_wrong_addresses_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="is not the address of a server"):
        base_url(given)


def call(handler: Handler, *, body: Any = None, timeout: float = 60.0, key: str | None = None) -> Any:
    """Return the answer to GET /x, or to POST if there is a body."""

    async def main() -> Any:
        app = web.Application()
        app.router.add_route("*", "/x", handler)
        async with (
            TestServer(app) as server,
            ServerClient(str(server.make_url("")), api_key=key, timeout=timeout) as client,
        ):
            return await (client.get_json("/x") if body is None else client.post_json("/x", body))

    return asyncio.run(main())


def test_json_is_sent_and_received() -> None:
    async def echo(request: web.Request) -> web.Response:
        key = request.headers.get("Authorization")
        return web.json_response([request.method, key, await request.text()])

    assert call(echo) == ["GET", None, ""]
    assert call(echo, body={"n": 2}, key="k") == ["POST", "Bearer k", '{"n": 2}']


@pytest.mark.parametrize(
    ("status", "body", "kind", "shown"),
    [
        (
            401,
            '{"error": {"message": "no key"}}',
            UserError,
            "answers 401: no key; give the server's key with --api-key",
        ),
        (404, '{"detail": "Not Found"}', NotFound, "answers 404: Not Found"),
        (400, "two\nlines", UserError, "answers 400: two lines"),
        (500, "", EngineError, "answers 500: no message"),
        (503, '{"error": "later"}', Unavailable, "answers 503: later"),
        (200, "<html>", UserError, "does not answer with JSON"),
    ],
)
def test_error_statuses(status: int, body: str, kind: type[ShoalError], shown: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, text=body, headers={"Retry-After": "7"})

    with pytest.raises(kind) as raised:
        call(answer)
    assert shown in str(raised.value)
    assert "/x " in str(raised.value)
    if isinstance(raised.value, Unavailable):
        assert raised.value.retry_after == 7


def test_a_server_that_does_not_answer() -> None:
    async def silent(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(EngineError, match=r"/x did not answer within 0.1 s"):
        call(silent, timeout=0.1)


def test_a_lost_connection() -> None:
    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(EngineError, match="/x: the connection was lost: "):
        call(hang_up, body={})


def test_a_port_without_a_server() -> None:
    with socket.socket() as taken:  # the port is taken, but no server listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"

        async def main() -> None:
            async with ServerClient(url, timeout=60) as client:
                await client.get_json("/x")

        with pytest.raises(UserError, match=f"^no server at {url}: connection refused$"):
            asyncio.run(main())


def test_long_messages_are_shortened() -> None:
    assert error_message('{"message": "' + "x" * 5000 + '"}') == "x" * 300 + "..."
