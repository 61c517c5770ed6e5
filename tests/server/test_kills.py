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

STREAMS = 32
TOKENS = 60
WAIT_S = 180.0
ROLES = ("worker", "engine")
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


def prompt_of(number: int) -> dict[str, Any]:
    """Return a prompt whose output is long. Every second one is drawn with a seed, the others are greedy."""
    drawn = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0.0}
    return {"prompt": f"Count from {number} to {number + 40}:", **drawn}


async def stream(client: AsyncOpenAI, number: int) -> str:
    text, finish = [], None
    answer = await client.completions.create(
        model="bundled", max_tokens=TOKENS, stream=True, extra_body={"ignore_eos": True}, **prompt_of(number)
    )
    async for chunk in answer:
        assert finish is None
        text.append(chunk.choices[0].text)
        finish = chunk.choices[0].finish_reason
    assert finish == "length"
    return "".join(text)


class Traffic:
    """One stream per twin at any time, started again and again; each must equal its undisturbed twin."""

    def __init__(self, client: AsyncOpenAI, twins: list[str]) -> None:
        self.ended = 0
        self._stopping = False
        self._tasks = [asyncio.create_task(self._run(client, number, twin)) for number, twin in enumerate(twins)]

    async def _run(self, client: AsyncOpenAI, number: int, twin: str) -> None:
        while not self._stopping:
            assert await stream(client, number) == twin
            self.ended += 1

    def check(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        self._stopping = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), WAIT_S)


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


async def settled(server: ShoalServer, traffic: Traffic, ends: int) -> Any:
    """Return the status once all processes that have ended were replaced, and more streams have ended since.

    Args:
        ends: how many processes have ended so far: engines with all their ranks, or ranks alone.
    """
    deadline, goal = time.monotonic() + WAIT_S, None
    while True:
        traffic.check()
        status = await asyncio.to_thread(server.status)
        ready = all(replica["state"] == "ready" for replica in status["replicas"])
        if goal is None and ready and restarts_of(status) + replacements_of(status) >= ends:
            goal = traffic.ended + STREAMS // 2
        if goal is not None and traffic.ended >= goal:
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
    times = 3 if request.config.getoption("--matrix") else 1

    async def run(server: ShoalServer) -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
            await disturb(server, client)

    async def disturb(server: ShoalServer, client: AsyncOpenAI) -> None:
        twins = await asyncio.gather(*(stream(client, number) for number in range(STREAMS)))
        traffic = Traffic(client, list(twins))
        ends = 0
        status = await settled(server, traffic, ends)
        roles = ROLES if has_rank_processes else ("engine",)
        for turn, (role, number) in enumerate([(role, number) for role in roles for number in SIGNALS] * times):
            os.kill(victim(status, role, turn), number)
            ends += 1
            status = await settled(server, traffic, ends)
        assert status["replays"] > 0
        replaced = ends // len(roles) if has_rank_processes else 0
        if has_rank_processes:
            os.kill(victim(status, "worker", 1), signal.SIGUSR1)
            why = await unhealthy(server)
            assert re.search(r"replica 0: rank \d .*does nothing in step \d+", why)
            ends, replaced = ends + 1, replaced + 1
            status = await settled(server, traffic, ends)
            assert server.get("/health") == {"status": "ok"}
        await traffic.stop()
        assert replacements_of(status) == replaced
        assert restarts_of(status) == ends - replacements_of(status)

    with ShoalServer(*layout, "--max-restarts", "100", "--warm-spares", "1", environment=HANGS_ON_SIGNAL) as server:
        asyncio.run(run(server))
        assert server.stop() == 0
        assert server.pids() == set()
