"""Grammars that crash their process or never finish compiling: a server refuses them and answers all others."""

import concurrent.futures
import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from support.servers import ShoalServer

pytestmark = pytest.mark.slow  # starts processes

_LONG_S = 110.0
ENDLESS = 'start: %json {"type": "integer", "multipleOf": 9999991}'


@pytest.fixture(scope="module")
def server() -> Iterator[ShoalServer]:
    with ShoalServer() as server:
        yield server


def post(server: ShoalServer, body: dict[str, Any]) -> tuple[int, Any]:
    asked = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=_LONG_S) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def chain(rules: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(rules)) + f'r{rules}: "x"\n'


HOSTILE: dict[str, dict[str, Any]] = {
    "a chain of rules": {"guided_grammar": chain(5000)},
    "an endless number": {"guided_grammar": ENDLESS},
    "an endless number in structured_outputs": {"structured_outputs": {"grammar": ENDLESS}},
}


def test_hostile_grammars_are_refused_and_delay_no_other_request(server: ShoalServer) -> None:
    pids = server.pids()
    with concurrent.futures.ThreadPoolExecutor(len(HOSTILE)) as pool:
        refused = [pool.submit(post, server, {"prompt": "x"} | fields) for fields in HOSTILE.values()]
        while not all(each.done() for each in refused):
            status, answer = post(server, {"prompt": "37 + 45 =", "max_tokens": 4, "temperature": 0})
            assert (status, answer["choices"][0]["text"].split()[0]) == (200, "82")
    for future in refused:
        status, answer = future.result()
        assert status == 422, answer
        assert answer["error"]["param"] in ("guided_grammar", "structured_outputs")
        assert "simplify it" in answer["error"]["message"]
    assert pids <= server.pids()  # no process of the server has died


def test_an_ambiguous_grammar_is_obeyed(server: ShoalServer) -> None:
    body = {"prompt": "x", "guided_grammar": 'start: e\ne: e e | "a"\n', "n": 4, "max_tokens": 60, "temperature": 1}
    status, answer = post(server, body)
    assert status == 200
    assert {frozenset(choice["text"]) for choice in answer["choices"]} == {frozenset("a")}


def test_a_second_signal_ends_the_server_even_while_a_grammar_is_compiled() -> None:
    with ShoalServer("--shutdown-timeout", "600") as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(post, server, {"prompt": "x", "guided_grammar": ENDLESS})
        stream = pool.submit(post, server, {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "n": 4})
        deadline = time.monotonic() + _LONG_S
        while server.status()["replicas"][0]["held"] == 0:
            assert time.monotonic() < deadline
        server.process.send_signal(signal.SIGTERM)
        while server.status()["accepting"]:  # two signals at the same moment would count as one
            assert time.monotonic() < deadline
        assert server.stop(timeout=60.0) == 1  # at once, though the first signal gives running requests 600 s
        for future in (waiting, stream):
            assert future.exception() is not None or future.result()[0] >= 400
