"""Limits on connections and requests: the middleware and the protocol, with a small application behind them."""

import asyncio
import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from shoal.server.http.limits import RequestLimits, add_limits
from shoal.server.http.protocol import BoundedProtocol, protocol_with
from shoal.server.settings import ServerSettings

WAIT_S = 60.0
SOON = RequestLimits(
    header_s=0.3, body_s=0.3, write_s=0.3, linger_s=0.5, body_bytes=1000, header_bytes=2000, headers=20
)
CHUNK = b"x" * 10_000


class Server:
    """A server with `limits`. Its application returns what it got, streams endlessly, and counts its streams."""

    def __init__(self, limits: RequestLimits, **settings: Any) -> None:
        self.streaming = 0
        self.sent = 0
        self.ended = threading.Event()
        self.protocol = protocol_with(limits)
        app = self._app()
        add_limits(app, ServerSettings(**settings), limits)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = self._socket.getsockname()
        config = uvicorn.Config(
            app, http=self.protocol, ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[self._socket])))

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/echo")
        async def echo(request: Request) -> JSONResponse:
            return JSONResponse({"bytes": len(await request.body())})

        @app.get("/health")
        async def health() -> str:
            return "well"

        @app.get("/v1/models")
        async def models() -> str:
            return "one"

        @app.get("/stream")
        async def stream() -> StreamingResponse:
            async def endless() -> Any:
                self.streaming += 1
                try:
                    while True:
                        self.sent += 1
                        yield CHUNK
                        await asyncio.sleep(0)
                finally:
                    self.streaming -= 1
                    self.ended.set()

            return StreamingResponse(endless())

        return app

    def __enter__(self) -> "Server":
        self._thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.server.should_exit = True
        self._thread.join(WAIT_S)
        self._socket.close()

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)

    @contextlib.contextmanager
    def connect(self) -> Iterator[socket.socket]:
        with socket.create_connection(self.address, timeout=WAIT_S) as client:
            yield client

    def send(self, *parts: bytes) -> tuple[int, dict[str, str], Any]:
        """Send parts of a request, and return (status, headers, body) of the answer."""
        with self.connect() as client:
            for part in parts:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(part)
            return answer(client)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def answer(client: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Return the next answer on a connection, with its body read as JSON."""
    with client.makefile("rb") as file:
        status = file.readline()
        assert status, "no answer"
        headers = {}
        while (line := file.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        return int(status.split()[1]), headers, json.loads(file.read(int(headers["content-length"])))


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /echo HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: a", *headers, "", ""]).encode()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(SOON) as running:
        yield running


# --- bodies --------------------------------------------------------------------------------------------------------


def test_a_body_is_passed_on_in_one_piece(server: Server) -> None:
    assert server.send(post(b"x" * 1000))[0::2] == (200, {"bytes": 1000})
    chunked = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert server.send(chunked, b"2\r\nab\r\n", b"3\r\ncde\r\n", b"0\r\n\r\n")[0::2] == (200, {"bytes": 5})


def test_a_body_that_is_too_large_by_its_content_length_is_refused_before_it_comes(server: Server) -> None:
    head = post(b"").replace(b"Content-Length: 0", b"Content-Length: 100000000")
    status, _, body = server.send(head)
    assert status == 413
    assert "1000 bytes" in body["error"]["message"]
    assert body["error"]["type"] == "invalid_request_error"


def test_a_chunked_body_is_refused_once_it_is_too_large(server: Server) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert server.send(head, *[b"100\r\n" + b"x" * 256 + b"\r\n"] * 5)[0] == 413


def test_a_refused_body_is_read_to_its_end_and_the_connection_stays_open(server: Server) -> None:
    with server.connect() as client:
        client.sendall(post(b"x" * 5_000_000))
        assert answer(client)[0] == 413
        client.sendall(post(b"abc"))
        assert answer(client)[0::2] == (200, {"bytes": 3})


def test_a_body_that_does_not_end_is_refused(server: Server) -> None:
    status, _, body = server.send(post(b"x" * 100)[:-50])
    assert status == 408
    assert body["error"]["code"] == "request_timeout"


def test_a_body_that_no_endpoint_reads_does_not_hold_its_connection(server: Server) -> None:
    with server.connect() as client:
        client.sendall(get("/health", "Content-Length: 10"))
        assert answer(client)[0] == 200
        wait_until(lambda: client.recv(10) == b"")


def test_bodies_that_are_read_at_the_same_time_have_a_common_limit() -> None:
    with Server(RequestLimits(bodies_bytes=1000)) as server, server.connect() as first:
        first.sendall(post(b"x" * 2000)[:-1000])
        with server.connect() as second:
            second.sendall(post(b"x" * 2000)[:-900])
            status, headers, _ = answer(second)
        assert (status, headers["retry-after"]) == (503, "1")
        first.sendall(b"x" * 1000)
        assert answer(first)[0] == 503
        assert server.send(post(b"x" * 900))[0] == 200


def test_a_compressed_body_is_refused(server: Server) -> None:
    assert server.send(post(b"x", "Content-Encoding: gzip"))[0] == 415


# --- headers -------------------------------------------------------------------------------------------------------


def test_a_flood_of_headers_is_refused(server: Server) -> None:
    for flood in (
        get("/health", *[f"X-{i}: y" for i in range(100)]),
        get("/health", *[f"X-{i}: {'y' * 300}" for i in range(10)]),
        get("/health?" + "y" * 3000),
        get("/health", "X: " + "y" * 3000),
        get("/health", *[f"X-{i}: y" for i in range(500_000)]),
    ):
        status, headers, body = server.send(flood)
        assert status == 431
        assert headers["connection"] == "close"
        assert body["error"]["code"] == "headers_too_large"


def test_a_header_that_never_ends_is_not_kept_in_memory() -> None:
    """The parser alone would keep all of it."""
    with Server(RequestLimits(header_bytes=50_000)) as server, server.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(10_000):
                client.sendall(CHUNK)
                if select.select([client], [], [], 0)[0]:
                    break
        assert answer(client)[0] == 431


def test_a_trailer_has_the_limit_of_headers(server: Server) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    assert server.send(head + b"".join(b"X-%d: y\r\n" % i for i in range(100)) + b"\r\n")[0] == 431


def test_headers_that_come_one_by_one_have_a_deadline(server: Server) -> None:
    status, _, body = server.send(b"GET /health HTTP/1.1\r\nX: ")
    assert status == 408
    assert "0.3 s" in body["error"]["message"]


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
def test_a_connection_without_a_request_is_closed(server: Server, sent: bytes) -> None:
    with server.connect() as client:
        client.sendall(sent)
        assert client.recv(10) == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET http:// HTTP/1.1\r\n\r\n",
        b"GET /h\xc3\xa9alth HTTP/1.1\r\nHost: a\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: a\0b\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc",
    ],
)
def test_bytes_that_are_not_http_are_refused(server: Server, sent: bytes) -> None:
    status, _, body = server.send(sent)
    assert 400 <= status < 500
    assert "Traceback" not in str(body)
    assert server.send(get("/health"))[0] == 200


# --- connections ---------------------------------------------------------------------------------------------------


def test_requests_on_one_connection_are_answered_in_order(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"".join(post(b"x" * i) for i in range(10)))
        with client.makefile("rb") as file:
            for i in range(10):
                head = b"".join(iter(file.readline, b"\r\n"))
                assert b"200 OK" in head
                assert json.loads(file.read(len('{"bytes":0}'))) == {"bytes": i}


def test_a_flood_of_requests_on_one_connection_ends_it(server: Server) -> None:
    with server.connect() as client, contextlib.suppress(ConnectionError):
        client.sendall(get("/health") * 100_000)
        while client.recv(1 << 20):
            pass
    wait_until(lambda: server.connections == 0)


def test_idle_connections_have_a_limit() -> None:
    with Server(RequestLimits(idle_connections=2)) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(2)]
        for turn in (0, 1, 0):  # then the second one has been idle longest
            clients[turn].sendall(get("/health"))
            answer(clients[turn])
        fresh = [
            stack.enter_context(server.connect()) for _ in range(5)
        ]  # a burst of clients that have sent nothing yet
        for client in (*clients, *fresh):
            client.sendall(get("/health"))
            assert answer(client)[0] == 200
        rested = [*clients, *fresh][:-2]
        assert [client.recv(10) for client in rested] == [b""] * 5


def test_new_connections_close_idle_ones_and_no_others() -> None:
    with Server(RequestLimits(connections=2)) as server, server.connect() as busy, server.connect() as resting:
        busy.sendall(get("/stream"))
        wait_until(lambda: server.streaming == 1)
        resting.sendall(get("/health"))
        assert answer(resting)[0] == 200
        with server.connect() as third:
            third.sendall(get("/stream"))
            wait_until(lambda: server.streaming == 2)
            assert resting.recv(10) == b""
            status, headers, _ = server.send()
            assert (status, headers["retry-after"]) == (503, "1")


def test_a_client_that_disconnects_ends_its_stream(server: Server) -> None:
    server.ended.clear()
    with server.connect() as client:
        client.sendall(get("/stream"))
        assert client.recv(100)
    assert server.ended.wait(WAIT_S)
    wait_until(lambda: server.streaming == 0)


def test_a_client_that_disconnects_ends_its_stream_even_if_another_request_waits(server: Server) -> None:
    """The first of the two requests runs."""
    server.ended.clear()
    with server.connect() as client:
        client.sendall(get("/stream") * 2)
        assert client.recv(100)
    assert server.ended.wait(WAIT_S)
    wait_until(lambda: server.streaming == 0)


def test_a_client_that_does_not_read_stops_its_stream_and_then_loses_it() -> None:
    with Server(RequestLimits(write_s=1.0)) as server, server.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.sendall(get("/stream"))
        wait_until(lambda: server.streaming == 1)
        (protocol,) = server.server.server_state.connections
        assert isinstance(protocol, BoundedProtocol)
        wait_until(lambda: protocol.flow.write_paused)
        assert protocol.transport.get_write_buffer_size() < 10 * len(CHUNK)
        assert server.send(get("/health"))[0] == 200
        assert server.ended.wait(WAIT_S)
        wait_until(lambda: server.connections == 0)


# --- keys and origins ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    settings = {"api_keys": ("one", "two"), "allowed_origins": ("http://page",), "root_path": "/llm"}
    with Server(SOON, **settings) as running:
        yield running


@pytest.mark.parametrize("given", ["Bearer one", "bearer two", "Bearer  two "])
def test_a_right_key_is_accepted(guarded: Server, given: str) -> None:
    assert guarded.send(get("/v1/models", f"Authorization: {given}"))[0] == 200


@pytest.mark.parametrize("given", ["", "one", "Bearer", "Bearer three", "Basic one", "Bearer one two", "Bearer \xff"])
def test_a_wrong_key_is_refused(guarded: Server, given: str) -> None:
    headers = (f"Authorization: {given}",) if given else ()
    sent = "\r\n".join(["GET /v1/models HTTP/1.1", "Host: a", *headers, "", ""]).encode("latin-1")
    status, found, body = guarded.send(sent)
    assert status == 401
    assert found["www-authenticate"] == "Bearer"
    assert body["error"]["code"] == "invalid_api_key"
    assert "one" not in body["error"]["message"]


def test_the_key_is_checked_before_the_body_and_not_for_health(guarded: Server) -> None:
    assert guarded.send(post(b"x" * 5000))[0] == 401
    assert guarded.send(get("/health"))[0] == 200
    assert guarded.send(get("/health/../v1/models"))[0] == 401
    assert guarded.send(get("/nothing"))[0] == 401


def test_web_pages_of_allowed_origins_may_call(guarded: Server) -> None:
    asks = ["Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization"]
    with guarded.connect() as client:
        client.sendall(
            "\r\n".join(["OPTIONS /echo HTTP/1.1", "Host: a", "Origin: http://page", *asks, "", ""]).encode()
        )
        assert b" 200 " in client.recv(10_000)
    _, headers, _ = guarded.send(post(b"x", "Origin: http://page"))
    assert headers["access-control-allow-origin"] == "http://page"
    _, headers, _ = guarded.send(post(b"x", "Origin: http://other"))
    assert "access-control-allow-origin" not in headers
