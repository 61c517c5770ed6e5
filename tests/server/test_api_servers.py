"""Several API servers in front of one fleet, and how a server ends."""

import asyncio
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from shoal.config.engine_options import EngineOptions
from shoal.devices import cpu
from shoal.errors import ConfigError, EngineError
from shoal.launch.hub import BUNDLED
from shoal.launch.open_model import open_model, open_served_model
from shoal.llm import async_llm
from shoal.llm.async_llm import AsyncLLM
from shoal.server import api_process, serve
from shoal.server.api_process import ChannelLine
from shoal.server.api_servers import ApiServers, seed_of
from shoal.server.http.listening import Listening, Server, make_server
from shoal.server.settings import ServerSettings
from shoal.transport.channel import Channel
from shoal.transport.process import ChildProcess
from shoal.wire.base import replace_fields
from support.fake_backend import FakeBackend
from support.fleet_status import fleet
from support.servers import ShoalServer

pytestmark = pytest.mark.slow

WAIT_S = 90.0
TOKENS = 100
STREAMS = 2  # streams of each API server when one of them is killed or stopped


def until(check: Callable[[], Any], event: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (found := check()):
        assert time.monotonic() < deadline, f"this did not happen within {WAIT_S:g} s: {event}"
        time.sleep(0.05)
    return found


# --- real servers ----------------------------------------------------------------------------------------------------


class Streaming:
    """A stream on a connection of its own. `owner` is the process that accepted the connection."""

    def __init__(self, server: ShoalServer, number: int) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
        body = {
            "model": "bundled",
            "prompt": f"Count from {number} to {number + 40}:",
            "max_tokens": TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
        }
        self.connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        self.number = number
        self.error = ""
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        self.owner = owner_of(server, self.connection)

    def read(self) -> tuple[str, bool]:
        """Return (text, whether the stream came to its end)."""
        text: list[str] = []
        try:
            while line := self.answer.readline():
                if line.strip() == b"data: [DONE]":
                    return "".join(text), True
                if not line.startswith(b"data: "):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    self.error = chunk["error"]["message"]
                    break
                text.append(chunk["choices"][0]["text"])
        except (OSError, http.client.HTTPException):
            pass
        finally:
            self.connection.close()
        return "".join(text), False


def owner_of(server: ShoalServer, connection: http.client.HTTPConnection) -> int:
    """Return the server's process that holds the other end. The end of a closed connection has no inode."""
    ports = tuple(end[1] for end in (connection.sock.getpeername(), connection.sock.getsockname()))
    ends = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = {
        fields[9]
        for fields in ends
        if tuple(int(field.partition(":")[2], 16) for field in fields[1:3]) == ports and fields[9] != "0"
    }
    for pid in server.pids():
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(entry) == f"socket:[{inode}]":
                    return pid
            except OSError:
                continue
    raise AssertionError("no process of the server has the connection")


def api_pids(server: ShoalServer) -> set[int]:
    found = set()
    for pid in server.pids():
        try:
            if b"shoal.server.api_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
        except OSError:
            continue
    return found


def numbers(server: ShoalServer) -> tuple[int, dict[str, float]]:
    """Return the process that answered, and the metrics by name (and reason), summed over engines."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    owner, text = owner_of(server, connection), answer.read().decode()
    connection.close()
    found: dict[str, float] = {}
    for name, labels, value in re.findall(r"^([a-z_:]+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
        reason = re.search(r'finished_reason="(\w+)"', labels)
        key = f"{name} {reason[1]}" if reason else name
        found[key] = found.get(key, 0.0) + float(value)
    return owner, found


def streams_of_both(server: ShoalServer, twins: Sequence[str]) -> list[Streaming]:
    """Start `STREAMS` streams on each API server."""
    found: list[Streaming] = []
    deadline = time.monotonic() + WAIT_S
    pids = api_pids(server)
    while any(sum(each.owner == pid for each in found) < STREAMS for pid in pids):
        assert time.monotonic() < deadline, f"an API server has accepted no connections for {WAIT_S:g} s"
        streaming = Streaming(server, len(found) % len(twins))
        if sum(each.owner == streaming.owner for each in found) < STREAMS:
            found.append(streaming)
        else:
            streaming.connection.close()
    return found


def disturb(server: ShoalServer, twins: Sequence[str], number: int) -> None:
    """Send a signal to one API server: the streams of the other go on, and the first is started again."""
    pids = api_pids(server)
    streams = streams_of_both(server, twins)
    victim = streams[-1].owner  # its last stream has just begun
    os.kill(victim, number)
    with ThreadPoolExecutor(len(streams)) as pool:
        for streaming, (text, whole) in zip(streams, pool.map(Streaming.read, streams), strict=True):
            assert twins[streaming.number].startswith(text)
            assert whole or streaming.owner == victim
            assert not whole or text == twins[streaming.number]
    until(lambda: victim not in api_pids(server) and len(api_pids(server)) == len(pids), "the API server starts again")
    until(lambda: server.status()["replicas"][0]["held"] == 0, "the requests of its clients are freed")


@pytest.mark.timeout(600)
def test_when_an_api_server_is_killed_or_stopped_the_other_goes_on() -> None:
    with ShoalServer("--api-server-count", "2") as server:
        until(lambda: len(api_pids(server)) == 2, "two API servers")
        twins = []
        for number in range(2):
            text, whole = Streaming(server, number).read()
            assert whole
            twins.append(text)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            disturb(server, twins, number)

        scraped: dict[int, dict[str, float]] = {}
        until(lambda: scraped.update([numbers(server)]) or len(scraped) == 2, "both have answered /metrics")
        for each in scraped.values():
            assert each["shoal:api_server_restarts_total"] == 2
            assert each["vllm:request_success_total length"] >= 2 + 2 * STREAMS
            assert each["vllm:request_success_total abort"] >= 2  # streams of the two processes that ended
        kept = ("vllm:generation_tokens_total", "vllm:request_success_total length", "vllm:request_success_total abort")
        first, second = scraped.values()
        assert first["process_start_time_seconds"] == second["process_start_time_seconds"]  # of the fleet's process
        assert [first[name] for name in kept] == [second[name] for name in kept]

        last = Streaming(server, 0)
        server.process.send_signal(signal.SIGTERM)
        assert last.read() == (twins[0], True)
        assert server.process.wait(WAIT_S) == 0
        assert server.pids() == set()


@pytest.mark.timeout(600)
def test_every_process_uses_the_tokenizer_of_another_folder(tmp_path: Path) -> None:
    """API servers use it for prompts and chats, and the engine for structured outputs.

    They all end with a replica that may not be started again.
    """
    shutil.copytree(BUNDLED, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(BUNDLED, tmp_path / "other", ignore=shutil.ignore_patterns("model*"))
    flags = ("--tokenizer", "other", "--served-model-name", "bundled", "--api-server-count", "2", "--max-restarts", "0")
    asked = {"messages": [{"role": "user", "content": "37 + 45 ="}], "temperature": 0, "max_tokens": 8}
    asked["structured_outputs"] = {"regex": "[0-9]{3}"}
    with ShoalServer("model", *flags, folder=tmp_path) as server:
        pids = until(lambda: len(found := api_pids(server)) == 2 and found, "two API servers")
        host, port = server.url.removeprefix("http://").split(":")
        owners: set[int] = set()

        def ask() -> bool:
            connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
            connection.request("POST", "/v1/chat/completions", json.dumps(asked), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                owners.add(owner_of(server, connection))
                answer = json.loads(response.read())
            connection.close()
            assert re.fullmatch("[0-9]{3}", answer["choices"][0]["message"]["content"]), answer
            return bool(owners == pids)

        until(ask, "both have answered")
        check_that_it_ends_without_replicas(server)


def check_that_it_ends_without_replicas(server: ShoalServer) -> None:
    """Kill the only replica of a server that does not start it again: the server ends and names the cause."""
    streaming = Streaming(server, 0)
    os.kill(int(server.status()["replicas"][0]["pid"]), signal.SIGKILL)
    assert not streaming.read()[1]
    assert "SIGKILL" in streaming.error
    assert server.process.wait(WAIT_S) == 1
    assert "SIGKILL" in server.log().splitlines()[-1]
    assert server.pids() == set()


def test_a_server_without_replicas_ends_and_names_the_cause() -> None:
    with ShoalServer("--max-restarts", "0") as server:
        check_that_it_ends_without_replicas(server)


# --- what an API server takes from its parent ------------------------------------------------------------------------


def test_an_api_server_plans_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replicas may already hold the memory of their plan, so little may be free."""
    planned = open_model(None, {}, online=True)
    discover = cpu.discover
    monkeypatch.setattr(cpu, "discover", lambda *some: dataclasses.replace(discover(*some), host_memory_available=1))
    with pytest.raises(ConfigError, match="more than this host has"):
        open_model(None, {}, online=True)
    for options in ({}, {"data_parallel_size": 2}, {"tensor_parallel_size": 2}):
        served = replace_fields(planned.served, max_model_len=321)
        assert open_served_model(None, options, served).served.max_model_len == 321


class _SilentLine:
    """A line whose other end never answers."""

    def __init__(self, deliver: object) -> None:
        self.fleet_server = self

    def send(self, messages: object) -> None: ...

    def ask(self, verb: str, payload: bytes = b"") -> "Future[bytes]":
        return Future()

    def close(self) -> None: ...


def test_a_question_without_an_answer_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_llm, "ANSWER_S", 0.01)

    async def ask() -> None:
        llm = AsyncLLM(connect=_SilentLine)
        with pytest.raises(EngineError, match=r"has not answered 'status' within 0\.01 s"):
            await llm.status()
        llm.close()

    asyncio.run(ask())


def test_each_start_of_each_api_server_has_its_own_seed() -> None:
    seeds = [seed_of(7, number, start) for number in range(3) for start in range(3)]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        EngineOptions.from_flat(None, {"seed": seed})


def test_a_large_request_does_not_wait_for_the_reading_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_process, "SLICE_S", WAIT_S * 10)
    ours, theirs = Channel.pair()
    ended = threading.Event()
    line = ChannelLine(ours, lambda answer: None, ended.set)
    theirs.setblocking(True)
    theirs.settimeout(WAIT_S)
    payload = bytes(8 << 20)
    line.ask("large", payload)
    got = 0
    while got < len(payload):
        got += len(theirs.recv(1 << 20))
    theirs.close()
    assert ended.wait(WAIT_S)
    line.close()
    ours.close()


def test_children_block_ctrl_c_and_sigterm_from_their_start() -> None:
    child = ChildProcess("shoal.server.api_process")
    try:
        status = Path(f"/proc/{child.pid}/status").read_text()
        blocked = re.search(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
        assert blocked is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            assert int(blocked[1], 16) >> (number - 1) & 1
    finally:
        child.kill()


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    (sock,) = Listening(port=0).bind()
    with sock:
        yield sock


def slow_app(size: int) -> FastAPI:
    app = FastAPI()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(size >> 16):
            yield bytes(1 << 16)

    @app.get("/")
    async def read() -> StreamingResponse:
        return StreamingResponse(chunks())

    return app


@pytest.mark.parametrize("reads", [True, False])
def test_slow_readers_have_until_the_end_of_the_drain(listener: socket.socket, reads: bool) -> None:
    size = 32 << 20  # more than the buffers of the sockets hold

    async def run() -> Server:
        server = make_server(slow_app(size), ServerSettings(), Listening())
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*listener.getsockname(), limit=1 << 16)
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        got = len(await reader.readexactly(1 << 16))
        server.stop(WAIT_S if reads else 1.0)
        while reads and (data := await asyncio.wait_for(reader.read(1 << 20), WAIT_S)):
            got += len(data)
        await asyncio.wait_for(serving, WAIT_S)
        assert not reads or got > size
        writer.close()
        return server

    assert asyncio.run(run()).complete == reads


class Front:
    """A stand-in for the HTTP server: it ends when it is stopped, early, with an error, or only without patience."""

    def __init__(self, *, sleeps: bool = False, error: Exception | None = None, early: bool = False) -> None:
        self.stops: list[float] = []
        self._stopped = asyncio.Event()
        self._sleeps = sleeps
        self._error = error
        self._early = early

    async def serve(self) -> bool:
        if not self._early:
            await self._stopped.wait()
        if self._error is not None:
            raise self._error
        return not self._sleeps

    def stop(self, patience: float) -> None:
        self.stops.append(patience)
        if not self._sleeps or not patience:
            self._stopped.set()


def end_of(front: Front, *, backend: FakeBackend | None = None, signals: int = 0, timeout: float = 20.0) -> int:
    """Return the exit code of a server with this front."""

    async def run() -> int:
        heard = serve.EndSignals()
        for _ in range(signals):
            heard.hear()
        served = backend or FakeBackend()
        return await serve.serve_until_end(served, front, heard, "here", timeout, look_s=0.01)

    return asyncio.run(asyncio.wait_for(run(), WAIT_S))


def test_a_fatal_fleet_ends_the_server_with_its_cause() -> None:
    failed = replace_fields(fleet(), accepting=False, failure="no replica is left: it was killed")
    with pytest.raises(EngineError, match="no replica is left: it was killed"):
        end_of(Front(), backend=FakeBackend(status=lambda: failed))


def test_the_error_that_ended_a_server_is_raised() -> None:
    with pytest.raises(EngineError, match="API server 1 died"):
        end_of(Front(early=True, error=EngineError("API server 1 died")))
    with pytest.raises(EngineError, match="no descriptors"):
        end_of(Front(early=True, error=OSError("no descriptors")))


def test_the_exit_code_after_a_signal_is_0_unless_the_end_fails() -> None:
    patient, hasty = Front(), Front()
    assert end_of(patient, signals=1, timeout=20.0) == 0
    assert 5.0 < patient.stops[0] <= 20.0
    assert end_of(hasty, signals=1, timeout=0.0) == 0
    assert hasty.stops == [5.0]
    assert end_of(Front(error=EngineError("it broke")), signals=1) == 1


class Sleeper:
    """The process of an API server that ends only when it is killed."""

    pid = 1
    exit_code: int | None = None

    def fileno(self) -> int:
        return 0

    @property
    def channel(self) -> "Sleeper":
        return self

    def wait(self, timeout: float) -> bool:
        time.sleep(timeout)
        return self.exit_code is not None

    def stopped(self) -> bool:
        return False

    def say(self, goodbye: bytes) -> None: ...

    def kill_process(self) -> None:
        self.exit_code = -9


def test_a_second_stop_ends_api_servers_at_once() -> None:
    class Head:
        fleet_server = type("FleetServer", (), {"do": staticmethod(lambda task: task())})

    async def run(sock: socket.socket) -> bool:
        model = open_model(None, {}, online=True)
        servers = ApiServers(Head(), model, ServerSettings(), Listening(), [sock], 2)  # type: ignore[arg-type]
        for server in servers.servers:
            server.child = Sleeper()  # type: ignore[assignment]
        serving = asyncio.create_task(servers.serve())
        servers.stop(WAIT_S * 10)
        assert not (await asyncio.wait([serving], timeout=0.5))[0]
        servers.stop(0.0)
        return await asyncio.wait_for(serving, WAIT_S)

    with socket.socket() as sock:
        assert not asyncio.run(run(sock))


def test_a_second_signal_ends_a_server_at_once() -> None:
    front = Front(sleeps=True)
    assert end_of(front, signals=2, timeout=1000.0) == 1
    assert front.stops[-1] == 0.0
