"""Processes of a loaded server are killed, stopped or hang: no stream loses, repeats or changes a token."""

import asyncio
import os
import re
import signal
import time
import urllib.error
from typing import Any

import pytest

from openai import AsyncOpenAI
from support.hanging import HANGS_ON_SIGNAL
from support.servers import ShoalServer

pytestmark = pytest.mark.slow

STREAMS = 12  # half of them run when a process ends, the others begin just after it
TOKENS = 120
WAIT_S = 180.0
ROLES = ("worker", "engine")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


def prompt_of(number: int) -> dict[str, Any]:
    """Return a prompt whose output is long. Every second one is drawn with a seed, the others are greedy."""
    drawn = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0.0}
    return {"prompt": f"Count from {number} to {number + 40}:", **drawn}


async def stream(client: AsyncOpenAI, number: int, begun: asyncio.Event | None = None) -> str:
    """Return the text of a stream. `begun` is set when its first token is here."""
    text, finish = [], None
    answer = await client.completions.create(
        model="bundled", max_tokens=TOKENS, stream=True, extra_body={"ignore_eos": True}, **prompt_of(number)
    )
    async for chunk in answer:
        assert finish is None
        if begun:
            begun.set()
        text.append(chunk.choices[0].text)
        finish = chunk.choices[0].finish_reason
    assert finish == "length"
    return "".join(text)


class Traffic:
    """Streams around the end of a process. Each must equal its undisturbed twin."""

    def __init__(self, client: AsyncOpenAI, twins: list[str]) -> None:
        self._client = client
        self._twins = twins
        self._tasks: list[asyncio.Task[None]] = []

    async def _run(self, number: int, begun: asyncio.Event) -> None:
        assert await stream(self._client, number, begun) == self._twins[number]

    def _start(self, numbers: range) -> list[asyncio.Event]:
        begun = [asyncio.Event() for _ in numbers]
        self._tasks += [
            asyncio.create_task(self._run(number, event)) for number, event in zip(numbers, begun, strict=True)
        ]
        return begun

    async def disturb(self, pid: int, number: int) -> None:
        """Send a signal to a process while half of the streams run. The other half begins just after it."""
        begun = self._start(range(STREAMS // 2))
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), WAIT_S)
        os.kill(pid, number)
        assert not all(task.done() for task in self._tasks), "some of them still run"
        self._start(range(STREAMS // 2, STREAMS))

    async def end(self) -> None:
        """Wait for the ends of all streams."""
        await asyncio.wait_for(asyncio.gather(*self._tasks), WAIT_S)
        self._tasks = []


def victim(status: Any, role: str, turn: int) -> int:
    replicas = status["replicas"]
    replica = replicas[turn % len(replicas)]
    if role == "engine":
        return int(replica["pid"])
    ranks = replica["stats"]["ranks"]
    return int(ranks[turn % len(ranks)]["pid"])


def restarts_of(status: Any) -> int:
    return sum(replica["restarts"] for replica in status["replicas"])


def replacements_of(status: Any) -> int:
    """Return how many ranks were replaced alone."""
    return sum(replica["stats"]["rank_replacements"] for replica in status["replicas"] if replica["stats"])


async def settled(server: ShoalServer, ends: int) -> Any:
    """Return the status once all processes that have ended were replaced.

    Args:
        ends: how many processes have ended so far: engines with all their ranks, or ranks alone.
    """
    deadline = time.monotonic() + WAIT_S
    while True:
        status = await asyncio.to_thread(server.status)
        ready = all(replica["state"] == "ready" for replica in status["replicas"])
        if ready and restarts_of(status) + replacements_of(status) >= ends:
            return status
        assert time.monotonic() < deadline, f"replicas are not all ready after {WAIT_S:g} s: {status}"
        await asyncio.sleep(0.05)


async def unhealthy(server: ShoalServer) -> str:
    """Return what /health says, once it answers with 503."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            await asyncio.to_thread(server.get, "/health")
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return error.read().decode()
            raise
        await asyncio.sleep(0.05)
    raise AssertionError("/health never answered with 503")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", [("-tp", "2"), ("-dp", "2")], ids=" ".join)
def test_streams_survive_the_end_of_any_process(layout: tuple[str, str], request: pytest.FixtureRequest) -> None:
    has_rank_processes = layout != ("-dp", "2")  # a replica of one rank runs it in the engine's process
    kills = [(role, number) for role in (ROLES if has_rank_processes else ("engine",)) for number in SIGNALS]
    if request.config.getoption("--matrix"):
        kills *= 3
    elif has_rank_processes:
        kills.remove(("engine", signal.SIGSTOP))  # the other layout has it

    async def run(server: ShoalServer) -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
            await disturb(server, client)

    async def disturb(server: ShoalServer, client: AsyncOpenAI) -> None:
        twins = await asyncio.gather(*(stream(client, number) for number in range(STREAMS)))
        traffic = Traffic(client, list(twins))
        ends = 0
        status = await settled(server, ends)
        for turn, (role, number) in enumerate(kills):
            replays = status["replays"]
            await traffic.disturb(victim(status, role, turn), number)
            await traffic.end()
            ends += 1
            status = await settled(server, ends)
            assert status["replays"] > replays or role == "worker", "a rank that is replaced alone has none replayed"
        replaced = sum(role == "worker" for role, _ in kills)
        if has_rank_processes:
            await traffic.disturb(victim(status, "worker", 1), signal.SIGUSR1)
            why = await unhealthy(server)
            assert re.search(r"replica 0: rank \d .*does nothing in step \d+", why)
            await traffic.end()
            ends, replaced = ends + 1, replaced + 1
            status = await settled(server, ends)
            assert server.get("/health") == {"status": "ok"}
        assert replacements_of(status) == replaced
        assert restarts_of(status) == ends - replacements_of(status)

    with ShoalServer(*layout, "--max-restarts", "100", "--warm-spares", "1", environment=HANGS_ON_SIGNAL) as server:
        asyncio.run(run(server))
        assert server.stop() == 0
        assert server.pids() == set()
