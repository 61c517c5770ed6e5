"""Requests that a server must survive: each is refused with a reason, and the next request is answered."""

import http.client
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.servers import ShoalServer

pytestmark = pytest.mark.slow

WAIT_S = 100.0
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GOOD = {"prompt": "Count:", "max_tokens": 4, "temperature": 0}
# How much the memory of the server's process may grow from one round of the same requests to the next: pages that the
# allocator keeps, cached grammars, and memory of pool threads. The bodies alone are three times as large.
TOLERATED_MIB = 32  # measurements differ by about 10
FIRST_MIB = 64  # what the first round may add: about 30 for the library of grammars, threads, caches


@pytest.fixture(scope="module")
def server() -> Iterator[ShoalServer]:
    with ShoalServer("--kv-cache-memory-bytes", "64MiB") as running:
        yield running


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.text = response.read().decode("utf-8")

    @property
    def error(self) -> Any:
        return json.loads(self.text)["error"]


def connect(server: ShoalServer) -> http.client.HTTPConnection:
    at = urllib.parse.urlparse(server.url)
    return http.client.HTTPConnection(at.hostname or "", at.port, timeout=WAIT_S)


def send(server: ShoalServer, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = connect(server)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def check_refused(answer: Answer) -> None:
    assert 400 <= answer.status < 500, answer.text[:1000]
    assert answer.error["message"]
    assert "\n" not in answer.error["message"]
    assert len(answer.text) < 5000
    assert "Traceback" not in answer.text
    assert "/shoal/" not in answer.text


def check_well(server: ShoalServer) -> None:
    answer = send(server, COMPLETIONS, GOOD)
    assert answer.status == 200, answer.text
    assert json.loads(answer.text)["usage"]["completion_tokens"] == 4


def resident_mib(server: ShoalServer) -> int:
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) >> 10


def settled_mib(server: ShoalServer) -> int:
    """Return the memory after one more request of a few megabytes."""
    answer = send(server, COMPLETIONS, {**GOOD, "user": "u" * 20_000})
    assert answer.status == 200, answer.text
    return resident_mib(server)


def completion(**fields: Any) -> tuple[str, Any]:
    return COMPLETIONS, {"prompt": "Hi", "max_tokens": 2, **fields}


def chat(**fields: Any) -> tuple[str, Any]:
    return CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **fields}


def bare(body: bytes) -> tuple[str, Any]:
    return COMPLETIONS, body


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


LARGE = {
    "100 MB": bare(b'{"prompt":"' + b"a" * 100_000_000 + b'"}'),
    "30 MB": bare(b'{"prompt":"' + b"a" * 30_000_000 + b'"}'),
    "a million lists": bare(b'{"prompt":[' + b"[]," * 1_000_000 + b"[]]}"),
    "ten million objects": bare(b'{"prompt":"a","metadata":[' + b"{}," * 10_000_000 + b"{}]}"),
    "a million ids": completion(prompt=[5] * 1_000_000),
    "a prompt of a million characters": completion(prompt="a" * 1_000_000),
    "a message of a million characters": chat(messages=[{"role": "user", "content": "\U0001f600" * 1_000_000}]),
    "messages": chat(messages=[{"role": "user", "content": "x"}] * 30_000),
    "JSON 10,000 deep": bare(b'{"prompt":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "prompts": completion(prompt=["a"] * 100_000),
    "prompts times n": completion(prompt=["a"] * 2000, n=2000, temperature=1),
    "stop texts": completion(stop=[f"z{i}" for i in range(10_000)]),
    "a stop text": completion(stop="z" * 1_000_000),
    "bad words": completion(bad_words=[f"z{i}" for i in range(10_000)]),
    "biases": completion(logit_bias={str(i): 1 for i in range(100_000)}),
    "tools": chat(
        tools=[{"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in range(10_000)],
        tool_choice="required",
    ),
    "a deep schema in a text": completion(guided_json='{"a":' * 50_000),
    "a regular expression": completion(guided_regex="(a|b|ab)*" * 5000),
    "brackets of a regular expression": completion(guided_regex="(" * 5000 + "a" + ")" * 5000),
    "a grammar": completion(guided_grammar="start: " + "(" * 10_000),
}
SMALL = {
    "nothing": bare(b""),
    "null": bare(b"null"),
    "a list": bare(b"[]"),
    "two values": bare(b'{"prompt":"a","max_tokens":1} x'),
    "invalid UTF-8": bare(b'{"prompt":"\xff\xfe\x80"}'),
    "UTF-16": bare(json.dumps({"prompt": "a"}).encode("utf-16")),
    "JSON 120 deep": bare(b'{"prompt":' + b"[" * 120 + b"]" * 120 + b"}"),
    "half a surrogate pair": completion(prompt="\ud800"),
    "... in a message": chat(messages=[{"role": "user", "content": "\udfff"}]),
    "... in a role": chat(messages=[{"role": "\ud800", "content": "x"}]),
    "... in a model": completion(model="\ud800"),
    "... in a name": completion(**{"\ud800": 1}),
    "... in a stop text": completion(stop=["\ud800"]),
    "... in fields without effect": completion(user="x", metadata={"a": ["\ud800"]}),
    "a token id as Python reads it": completion(logit_bias={"1_0": 1}),
    "a token id with a zero before it": completion(logit_bias={"1": 1, "01": 2}),
    "... in a bad word": completion(bad_words=["\ud800"]),
    "... in a regular expression": completion(guided_regex="\ud800"),
    "... in a choice": completion(guided_choice=["\ud800"]),
    "... in a schema": completion(guided_json={"const": "\ud800"}),
    "... in a tool": chat(tools=[{"type": "function", "function": {"name": "\ud800"}}], tool_choice="required"),
    "negative max_tokens": completion(max_tokens=-1),
    "1e400": bare(b'{"prompt":"a","temperature":1e400}'),
    "NaN": bare(b'{"prompt":"a","temperature":NaN}'),
    "Infinity": bare(b'{"prompt":"a","top_p":Infinity}'),
    "5,000 digits": bare(b'{"prompt":"a","max_tokens":' + b"9" * 5000 + b"}"),
    "priority": completion(priority=1 << 64),
    "n": completion(n=1_000_000),
    "n of a chat": chat(n=16_000, temperature=1),
    "best_of": completion(best_of=1_000_000),
    "logprobs": completion(logprobs=1_000_000),
    "an id outside the vocabulary": completion(prompt=[1 << 30]),
    "an id of 30 digits": completion(prompt=[10**30]),
    "a negative id": completion(prompt=[-1]),
    "ids and texts": completion(prompt=[1, "a"]),
    "no prompt": completion(prompt=""),
    "no prompts": completion(prompt=[]),
    "a schema that nothing satisfies": completion(guided_json={"type": "integer", "minimum": 5, "maximum": 1}),
    "the schema false": chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": False}}),
    "a schema that refers to itself": completion(guided_json={"$ref": "#"}),
    "a schema from elsewhere": completion(guided_json={"$ref": "http://127.0.0.1:1/x"}),
    "a schema 60 deep, with a number that is too long": completion(
        guided_json={"properties": {"a": nested(30)}, "required": ["a"], "minimum": 10**400}
    ),
    "a template": chat(chat_template="{% for i in range(10**9) %}x{% endfor %}"),
    "deep arguments of a call": chat(
        messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 50_000}}]}]
    ),
    "detokenize": ("/detokenize", {"tokens": [10**30]}),
    "tokenize": ("/tokenize", {"prompt": "\ud800"}),
    "responses": ("/v1/responses", {"input": [[]]}),
    "replicas": ("/v1/admin/replicas", {"replicas": -1}),
    "a replica": completion(data_parallel_rank=99),
}


@pytest.mark.parametrize("name", SMALL)
def test_hostile_requests_are_refused(server: ShoalServer, name: str) -> None:
    check_refused(send(server, *SMALL[name]))


@pytest.mark.parametrize("rank", ["garbage", "-1", "99", "9" * 40, "", "\xb2", "1.0", "nan", "0_0", "+0", "00"])
def test_a_header_that_names_no_replica_is_refused(server: ShoalServer, rank: str) -> None:
    check_refused(send(server, COMPLETIONS, GOOD, {"X-data-parallel-rank": rank}))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 10**18, "stop": ["e", "a", " "]},
        {"seed": 10**30},
        {"seed": -(10**30)},
        {"priority": (1 << 63) - 1},
        {"priority": -(1 << 63)},
        {"guided_regex": "(a+)+$"},
        {"guided_json": nested(35)},
    ],
    ids=str,
)
def test_odd_requests_are_answered(server: ShoalServer, fields: dict[str, Any]) -> None:
    answer = send(server, *completion(**fields))
    assert answer.status == 200, answer.text


def test_the_last_of_two_fields_with_the_same_name_counts(server: ShoalServer) -> None:
    answer = send(server, *bare(b'{"prompt":5,"prompt":"b","max_tokens":-1,"max_tokens":1}'))
    assert answer.status == 200
    assert json.loads(answer.text)["usage"]["completion_tokens"] == 1


def test_a_large_request_is_refused_and_its_memory_is_freed(server: ShoalServer) -> None:
    """The first request of a kind may leave libraries, threads and caches in memory; the next ones leave nothing."""
    check_well(server)
    fresh = resident_mib(server)
    refuse_large(server)
    wait_for(lambda server: settled_mib(server) <= fresh + FIRST_MIB, server)
    before = settled_mib(server)
    refuse_large(server)
    wait_for(lambda server: settled_mib(server) <= before + TOLERATED_MIB, server)


def refuse_large(server: ShoalServer) -> None:
    for name, (path, body) in LARGE.items():
        answer = send(server, path, body)
        assert 400 <= answer.status < 500, name
        check_refused(answer)


def test_the_memory_of_a_flood_of_headers_is_freed(server: ShoalServer) -> None:
    before = resident_mib(server)
    at = urllib.parse.urlparse(server.url)
    flood = b"GET /v1/models HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(1_000_000))
    for _ in range(5):
        with socket.create_connection((at.hostname, at.port), timeout=WAIT_S) as client:
            try:
                client.sendall(flood)
            except ConnectionError:
                continue
            assert b" 431 " in client.recv(1000)
    check_well(server)
    assert resident_mib(server) <= before + TOLERATED_MIB


def test_good_requests_are_answered_while_bad_ones_are_refused(server: ShoalServer) -> None:
    """Each good request gets the same text."""
    stop = threading.Event()
    texts: list[str] = []

    def ask() -> None:
        while not stop.is_set():
            texts.append(json.loads(send(server, COMPLETIONS, GOOD).text)["choices"][0]["text"])

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for path, body in [*LARGE.values(), *SMALL.values()]:
            check_refused(send(server, path, body))
    finally:
        stop.set()
        thread.join(WAIT_S)
    assert len(texts) > 10
    assert len(set(texts)) == 1


# --- clients that disconnect ---------------------------------------------------------------------------------------


def idle(server: ShoalServer) -> bool:
    """Wait until nothing runs and no block is held."""
    found = server.status()
    stats = [replica["stats"] for replica in found["replicas"]]
    return not found["queued"] and all(
        not each["running"] and not each["waiting"] and each["free_blocks"] == each["num_blocks"] for each in stats
    )


def busy(server: ShoalServer) -> bool:
    return any(replica["held"] for replica in server.status()["replicas"])


def wait_for(condition: Any, server: ShoalServer) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition(server):
        assert time.monotonic() < deadline, server.status()
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": ["Hi", "Ho"], "n": 4, "temperature": 1, "max_tokens": 900}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "n": 4, "max_tokens": 900}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 900}),
    ],
)
def test_the_blocks_of_a_client_that_disconnects_are_freed(
    server: ShoalServer, path: str, body: Any, stream: bool
) -> None:
    wait_for(idle, server)
    connection = connect(server)
    data = json.dumps({**body, "ignore_eos": True, "stream": stream})
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    wait_for(busy, server)
    generated = server.status()["replicas"][0]["stats"]["generated_tokens"]
    connection.close()
    wait_for(idle, server)
    requests = body.get("n", 1) * (len(body["prompt"]) if "prompt" in body else 1)
    assert server.status()["replicas"][0]["stats"]["generated_tokens"] - generated < 900 * requests
    check_well(server)


def test_a_client_that_does_not_read_delays_no_other(server: ShoalServer) -> None:
    """Its answer is computed, frees its blocks, and waits in memory until the client reads."""
    at = urllib.parse.urlparse(server.url)
    body = {"prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 16, "temperature": 1}
    data = json.dumps({**body, "logprobs": 20}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((at.hostname, at.port))
        client.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + data)
        client.settimeout(WAIT_S)
        wait_for(busy, server)
        check_well(server)
        wait_for(idle, server)
        received = b""
        while part := client.recv(1 << 16):
            received += part
    assert len(received) > 4 << 20, "more than the buffers of sockets hold"
    assert b"data: [DONE]" in received
    assert received.count(b'"finish_reason":"length"') == 16
