"""Pauses, sleep and resets over HTTP: the answers of endpoints, and the behaviour of real replicas."""

import asyncio
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from shoal.errors import ClosedError, ConfigError, EngineError, Unavailable, UserError
from shoal.llm.async_llm import AsyncLLM
from shoal.params import SamplingParams
from shoal.server.http.errors import add_handlers
from shoal.server.operations import pause_and_sleep
from shoal.wire.base import replace_fields
from shoal.wire.fleet import Operation
from support.fake_backend import FakeBackend
from support.fleet_status import fleet
from support.servers import ShoalServer
from support.traces import Trace

pytestmark = pytest.mark.slow

KEY = {"Authorization": "Bearer secret"}
WAIT_S = 120.0


def client(backend: FakeBackend) -> TestClient:
    app = FastAPI()
    add_handlers(app)
    app.include_router(pause_and_sleep.routes(backend))
    return TestClient(app)


@pytest.mark.parametrize(
    ("path", "asked", "answer"),
    [
        ("/pause", Operation("pause"), {"status": "paused"}),
        ("/pause?mode=keep", Operation("pause", mode="keep"), {"status": "paused"}),
        (
            "/pause?wait_for_inflight_requests=true&clear_cache=false",
            Operation("pause", mode="wait", clear_cache=False),
            {"status": "paused"},
        ),
        ("/resume", Operation("resume"), {"status": "resumed"}),
        ("/sleep", Operation("sleep"), {"status": "awake", "missing": []}),
        ("/sleep?level=2&mode=wait", Operation("sleep", "wait", 2), {"status": "awake", "missing": []}),
        ("/wake_up", Operation("wake_up"), {"status": "awake", "missing": []}),
        (
            "/wake_up?tags=weights&tags=kv_cache",
            Operation("wake_up", tags=("weights", "kv_cache")),
            {"status": "awake", "missing": []},
        ),
        (
            "/reset_prefix_cache?reset_running_requests=true",
            Operation("reset_prefix_cache", running=True),
            {"status": "reset", "forgotten_blocks": 7, "held_blocks": 2},
        ),
    ],
)
def test_requests_of_vllm_clients_are_understood(path: str, asked: Operation, answer: dict[str, Any]) -> None:
    backend = FakeBackend()
    found: Any = client(backend).post(path)
    assert (found.status_code, found.json()) == (200, answer)
    assert backend.operations == [asked]


@pytest.mark.parametrize(("activity", "paused", "sleeping"), [("awake", 0, 0), ("paused", 1, 0), ("asleep", 1, 1)])
def test_the_state_of_the_server_is_returned(activity: str, paused: int, sleeping: int) -> None:
    asked = client(FakeBackend(status=lambda: replace_fields(fleet(), activity=activity)))
    assert asked.get("/is_paused").json() == {"is_paused": bool(paused)}
    assert asked.get("/is_sleeping").json() == {"is_sleeping": bool(sleeping)}


@pytest.mark.parametrize(
    ("path", "param"),
    [("/pause?mode=later", "mode"), ("/sleep?level=3", "level"), ("/wake_up?tags=lungs", "tags[0]")],
)
def test_a_wrong_parameter_is_refused_by_name(path: str, param: str) -> None:
    backend = FakeBackend()
    found: Any = client(backend).post(path)
    assert (found.status_code, found.json()["error"]["param"], backend.operations) == (400, param, [])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("the engine is asleep"), 409),
        (Unavailable("the server ends"), 503),
        (ClosedError("the engine was closed"), 503),
        (EngineError("the engine does not answer"), 500),
    ],
)
@pytest.mark.parametrize("path", ["/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache"])
def test_each_error_has_its_http_status(path: str, error: Exception, status: int) -> None:
    found: Any = client(FakeBackend(refusal=error)).post(path)
    assert (found.status_code, found.json()["error"]["message"]) == (status, str(error))


# --- real servers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[ShoalServer]:
    """Two replicas of two ranks, and two processes that answer HTTP."""
    with ShoalServer(
        *("-tp", "2", "-dp", "2", "--api-server-count", "2", "--api-key", "secret", "--kv-cache-memory-bytes", "8MiB")
    ) as found:
        yield found


class Answer:
    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status_code = status
        self.headers = headers
        self.text = body.decode()

    def json(self) -> Any:
        return msgspec.json.decode(self.text)


def ask(server: ShoalServer, method: str, path: str, body: Any = None, *, key: bool = True) -> Answer:
    headers = {**(KEY if key else {}), "Content-Type": "application/json"}
    data = msgspec.json.encode(body) if body is not None else None
    request = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return Answer(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers, error.read())


def post(server: ShoalServer, path: str, body: Any = None) -> Answer:
    return ask(server, "POST", path, body)


def get(server: ShoalServer, path: str) -> Answer:
    return ask(server, "GET", path)


def completion(
    server: ShoalServer,
    seed: int,
    max_tokens: int = 100,
    on_text: Callable[[], Any] = lambda: None,
    *,
    replica: int | None = None,
) -> str:
    """Return the text of a streamed completion; `on_text` is called for each part that has text."""
    body = {
        "model": "bundled",
        "prompt": "Count from 3 to 9:",
        "seed": seed,
        "temperature": 0.9,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "data_parallel_rank": replica,
    }
    text = ""
    headers = {**KEY, "Content-Type": "application/json"}
    request = urllib.request.Request(server.url + "/v1/completions", msgspec.json.encode(body), headers)
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                text += msgspec.json.decode(line[6:])["choices"][0]["text"]
                on_text()
    return text


@pytest.mark.parametrize(("stop", "go_on"), [("/pause?mode=keep", "/resume"), ("/sleep?mode=keep", "/wake_up")])
def test_streams_pause_and_go_on_with_the_same_text(server: ShoalServer, stop: str, go_on: str) -> None:
    undisturbed = [completion(server, seed) for seed in range(2)]
    begun = [threading.Event(), threading.Event()]
    with ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(completion, server, seed, on_text=begun[seed].set) for seed in range(2)]
        assert all(event.wait(WAIT_S) for event in begun)
        assert post(server, stop).status_code == 200
        assert [get(server, "/is_paused").json() for _ in range(4)] == [{"is_paused": True}] * 4
        assert get(server, "/health").status_code == 200
        assert get(server, "/ready").status_code == 503
        assert sum(replica["held"] for replica in get(server, "/v1/admin/status").json()["replicas"]) > 0
        assert post(server, go_on).status_code == 200
        assert [stream.result(WAIT_S) for stream in streams] == undisturbed
    assert get(server, "/ready").status_code == 200


def test_a_rank_that_dies_asleep_is_replaced_by_a_sleeping_rank(server: ShoalServer) -> None:
    before = completion(server, 5, 8)
    assert post(server, "/sleep?level=2").json() == {"status": "asleep", "missing": ["weights", "kv_cache"]}
    refused = post(server, "/v1/completions", {"model": "bundled", "prompt": "x"})
    assert (refused.status_code, "POST /wake_up" in refused.text, "retry-after" in refused.headers) == (503, True, True)
    status = get(server, "/v1/admin/status").json()
    killed = status["replicas"][0]["stats"]["ranks"][1]["pid"]
    os.kill(killed, signal.SIGKILL)
    wait_until(server, lambda replicas: replicas[0]["stats"]["rank_replacements"] == 1)
    wait_until(server, lambda replicas: killed not in [rank["pid"] for rank in replicas[0]["stats"]["ranks"]])
    ranks = get(server, "/v1/admin/status").json()["replicas"][0]["stats"]["ranks"]
    assert [rank["weight_bytes"] for rank in ranks] == [0, 0]
    assert 'sleep_state="discard_all"} 1' in get(server, "/metrics").text
    assert post(server, "/wake_up").json() == {"status": "awake", "missing": []}
    assert completion(server, 5, 8) == before


def test_a_trace_goes_on_when_a_rank_is_replaced(server: ShoalServer) -> None:
    assert post(server, "/start_profile").json() == {"status": "recording"}
    again = post(server, "/start_profile")
    assert (again.status_code, "a trace is recorded already" in again.text) == (409, True)
    before = completion(server, 6, 8, replica=0)
    replaced, killed = replacements_and_pid(server)
    os.kill(killed, signal.SIGKILL)
    wait_until(server, lambda replicas: replicas[0]["stats"]["rank_replacements"] == replaced + 1)
    assert completion(server, 6, 8, replica=0) == before
    found = post(server, "/stop_profile").json()
    file = Path(found["file"])
    trace = Trace(file)
    file.unlink()
    assert (found["status"], found["events"], found["note"]) == ("written", len(trace.events), None)
    (note,) = [each for each in trace.events if each["ph"] == "i"]
    assert f"process {killed}" in note["name"]
    for track in ("replica 0, rank 0 (tp 0, pp 0)", "replica 0, rank 1 (tp 1, pp 0)"):
        steps = [each.begin for each in trace.of("step", track)]
        assert max(steps) > note["ts"]  # after the replacement too
        assert trace.of("layer", track)
        assert trace.of("operation", track)
    requests = [each for each in trace.of("request") if each.name.startswith("request")]
    assert [each.args["output_tokens"] for each in requests] == [8, 8]
    assert post(server, "/stop_profile").status_code == 409


def replacements_and_pid(server: ShoalServer) -> tuple[int, int]:
    """Return how many ranks of the first replica were replaced, and the process of its rank 1."""
    stats = get(server, "/v1/admin/status").json()["replicas"][0]["stats"]
    return stats["rank_replacements"], stats["ranks"][1]["pid"]


def wait_until(server: ShoalServer, holds: Callable[[Any], bool]) -> None:
    """Ask for the status until `holds` is true of the replicas."""
    deadline = time.monotonic() + WAIT_S
    while not holds(get(server, "/v1/admin/status").json()["replicas"]):
        assert time.monotonic() < deadline, server.log()[-2000:]


PATHS = ["/pause", "/resume", "/sleep", "/wake_up", "/reset_prefix_cache", "/start_profile", "/stop_profile"]


@pytest.mark.parametrize("path", PATHS)
def test_each_endpoint_requires_the_key_and_is_described(server: ShoalServer, path: str) -> None:
    assert ask(server, "POST", path, key=False).status_code == 401
    assert "post" in get(server, "/openapi.json").json()["paths"][path]


def test_a_drain_during_a_pause_ends_in_time_with_a_warning() -> None:
    with ShoalServer("--shutdown-timeout", "2", "--kv-cache-memory-bytes", "8MiB") as found:
        begun = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(completion, found, 1, 400, begun.set)
            assert begun.wait(WAIT_S)
            assert post(found, "/pause?mode=keep").status_code == 200
            assert found.stop() == 1
            stream.exception(WAIT_S)
        assert (
            "the server is paused: its 1 unfinished requests will be cut off, unless POST /resume lets them finish"
            in found.log()
        )


# --- AsyncLLM ----------------------------------------------------------------------------------------------------
def test_an_async_llm_pauses_and_sleeps_with_vllm_s_names() -> None:
    async def go() -> None:
        params = SamplingParams(temperature=0.9, seed=3, max_tokens=60, ignore_eos=True)

        async def text(begun: asyncio.Event | None = None) -> tuple[int, ...]:
            tokens: tuple[int, ...] = ()
            async for output in llm.generate("Count from 3 to 9:", params):
                tokens = output.outputs[0].token_ids
                if begun is not None:
                    begun.set()
            return tokens

        async with AsyncLLM(kv_cache_memory_bytes="8MiB") as llm:
            await llm.ready()
            undisturbed = await text()
            begun = asyncio.Event()
            running = asyncio.create_task(text(begun))
            await begun.wait()
            await llm.pause_generation(mode="keep")
            assert await llm.is_paused()
            assert not await llm.is_sleeping()
            await llm.resume_generation()
            await llm.sleep(level=1, mode="keep")
            assert await llm.is_sleeping()
            with pytest.raises(Unavailable, match="asleep"):
                await text()
            with pytest.raises(UserError, match="asleep"):
                await llm.resume_generation()
            await llm.wake_up(tags=["weights"])
            assert await llm.is_sleeping()
            await llm.wake_up(tags=["kv_cache"])
            assert await running == undisturbed
            assert await llm.reset_prefix_cache()
            assert await text() == undisturbed

    asyncio.run(asyncio.wait_for(go(), WAIT_S))
