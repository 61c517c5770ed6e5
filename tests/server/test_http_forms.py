"""Unusual requests to a real server: offers of other protocols, HTTP/1.0, HEAD."""

import json
import re
import socket
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from support.servers import ShoalServer

pytestmark = pytest.mark.slow  # starts processes

WAIT_S = 60.0
PROMPT = "Count from 3 to 6:"
GREEDY = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
OFFERS = {
    "h2c": H2C,
    "h2c, then close": ("Connection: Upgrade, HTTP2-Settings, close", *H2C[1:]),
    "websocket": (
        "Connection: keep-alive, Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ),
    "TLS": ("Upgrade: TLS/1.0, HTTP/2.0", "Connection: upgrade"),
    "unknown": ("upgrade: something/7", "connection: UPGRADE", "Upgrade: other"),
}
GETS = ("/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/bundled", "/dashboard", "/openapi.json")


@pytest.fixture(scope="module", params=["one process", "API servers"])
def server(request: pytest.FixtureRequest) -> Iterator[ShoalServer]:
    several = ("--api-server-count", "2") if request.param == "API servers" else ()
    with ShoalServer("--kv-cache-memory-bytes", "16M", *several) as running:
        yield running


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        found: str = json.loads(self.body)["choices"][0]["text"]
        return found


class Connection:
    def __init__(self, server: ShoalServer) -> None:
        at = urllib.parse.urlparse(server.url)
        self._socket = socket.create_connection((at.hostname, at.port), timeout=WAIT_S)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self._socket.sendall(part)

    def head(self) -> tuple[int, dict[str, str]]:
        status = int(self._file.readline().split()[1])
        lines = [line.decode("latin-1").strip() for line in iter(self._file.readline, b"\r\n")]
        return status, {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}

    def answer(self) -> Answer:
        """Return the next answer, which has a content-length."""
        status, headers = self.head()
        return Answer(status, headers, self.read(int(headers["content-length"])))

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def rest(self) -> bytes:
        """Return all bytes until the server closes the connection."""
        return self._file.read()


def post(body: object, *headers: str, version: str = "1.1") -> bytes:
    content = json.dumps(body).encode()
    return request("POST", "/v1/completions", f"Content-Length: {len(content)}", *headers, version=version) + content


def chunked(body: object, *headers: str) -> bytes:
    content = json.dumps(body).encode()
    half = len(content) // 2
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (content[:half], content[half:]))
    return request("POST", "/v1/completions", "Transfer-Encoding: chunked", *headers) + chunks + b"0\r\n\r\n"


def request(method: str, path: str, *headers: str, version: str = "1.1") -> bytes:
    kind = "Content-Type: application/json"
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: a", kind, *headers, "", ""]).encode()


def ask(server: ShoalServer, *parts: bytes) -> Answer:
    with Connection(server) as connection:
        connection.send(*parts)
        return connection.answer()


# --- offers of other protocols -------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", OFFERS.values(), ids=OFFERS)
def test_an_offer_of_another_protocol_is_ignored_and_the_body_is_read(
    server: ShoalServer, headers: Sequence[str]
) -> None:
    expected = ask(server, post(GREEDY)).text
    sent = post(GREEDY, *headers)
    assert ask(server, sent).text == expected
    assert ask(server, chunked(GREEDY, *headers)).text == expected
    assert ask(server, *(sent[i : i + 1] for i in range(len(sent)))).text == expected
    assert ask(server, request("GET", "/version", *headers)).status == 200
    assert ask(server, post({"prompt": 7}, *headers)).status == 400


def test_requests_after_one_with_an_offer_are_answered(server: ShoalServer) -> None:
    sent = [post(GREEDY, *H2C), chunked(GREEDY, *H2C), request("GET", "/version"), post(GREEDY, *OFFERS["TLS"])]
    with Connection(server) as connection:
        connection.send(b"".join(sent))
        answers = [connection.answer() for _ in sent]
    assert [answer.status for answer in answers] == [200] * len(sent)
    assert answers[0].text == answers[1].text == answers[3].text


def test_expect_100_continue_works_despite_an_offer(server: ShoalServer) -> None:
    head, _, body = post(GREEDY, *H2C, "Expect: 100-continue").partition(b"\r\n\r\n")
    with Connection(server) as connection:
        connection.send(head + b"\r\n\r\n")
        assert connection.head() == (100, {})
        connection.send(body)
        assert connection.answer().status == 200


def test_a_stream_works_despite_an_offer(server: ShoalServer) -> None:
    with Connection(server) as connection:
        connection.send(post({**GREEDY, "stream": True}, *OFFERS["h2c, then close"]))
        status, headers = connection.head()
        assert (status, headers["transfer-encoding"]) == (200, "chunked")
        assert b"data: [DONE]" in connection.rest()


def test_requests_for_a_proxy_are_refused(server: ShoalServer) -> None:
    assert ask(server, b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n").status == 405
    assert ask(server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").status == 400


# --- HTTP/1.0 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [(), ("Connection: keep-alive",), H2C])
def test_a_stream_to_a_client_of_http_1_0_ends_with_its_connection(server: ShoalServer, headers: Sequence[str]) -> None:
    with Connection(server) as connection:
        connection.send(post({**GREEDY, "stream": True}, *headers, version="1.0"))
        status, found = connection.head()
        assert (status, found["connection"]) == (200, "close")
        assert "transfer-encoding" not in found
        events = connection.rest().split(b"\n\n")
    assert all(event.startswith(b"data: ") for event in events[:-1])
    assert events[-2:] == [b"data: [DONE]", b""]


def test_a_connection_of_http_1_0_stays_open_if_the_client_asks_for_it(server: ShoalServer) -> None:
    kept = "Connection: keep-alive"
    with Connection(server) as connection:
        for sent in (post(GREEDY, kept, version="1.0"), request("HEAD", "/version", kept, version="1.0")):
            connection.send(sent)
            status, headers = connection.head()
            assert (status, headers["connection"]) == (200, "keep-alive")
            if sent.startswith(b"POST"):
                assert json.loads(connection.read(int(headers["content-length"])))["choices"]
        connection.send(post(GREEDY, version="1.0"))
        answer = connection.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert connection.rest() == b""


def test_a_client_of_http_1_0_never_gets_status_100(server: ShoalServer) -> None:
    assert ask(server, post(GREEDY, "Expect: 100-continue", version="1.0")).status == 200


# --- methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*GETS, "/docs", "/nothing", "/v1/models/none", "/v1/completions"])
def test_head_is_answered_like_get_but_without_a_body(server: ShoalServer, path: str) -> None:
    found = ask(server, request("GET", path))
    with Connection(server) as connection:
        connection.send(request("HEAD", path, "Connection: close"))
        status, headers = connection.head()
        assert connection.rest() == b""
    assert status == found.status
    changing = {"date", "x-request-id", "connection"} | ({"content-length"} if path == "/metrics" else set())
    assert {k: v for k, v in headers.items() if k not in changing} == {
        k: v for k, v in found.headers.items() if k not in changing
    }
    assert int(headers["content-length"]) > 0


def test_other_methods_are_refused_with_a_list_of_the_allowed_ones(server: ShoalServer) -> None:
    taken = dict.fromkeys(GETS, "GET, HEAD")
    taken |= {"/v1/completions": "POST", "/tokenize": "POST"}
    for path, methods in taken.items():
        refused = ask(server, request("DELETE", path))
        assert (refused.status, refused.headers["allow"]) == (405, methods), path
        with Connection(server) as connection:
            connection.send(request("OPTIONS", path))
            status, headers = connection.head()
            assert (status, headers["allow"]) == (204, methods), path
    assert ask(server, request("OPTIONS", "/nothing")).status == 404


def test_head_is_counted_by_its_path(server: ShoalServer) -> None:
    with Connection(server) as connection:
        for _ in range(3):
            connection.send(request("HEAD", "/v1/models"))
            assert connection.head()[0] == 200
        connection.send(request("GET", "/metrics"))
        page = connection.answer().body.decode()
    assert re.search(r'http_requests_total\{handler="/v1/models",method="HEAD",status="2xx"\} [1-9]', page)
