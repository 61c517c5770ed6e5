"""Streams from a server, one of whose processes is killed meanwhile. Benchmarks of recovery use it."""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

_SETTLE_S = 300.0
_POLL_S = 0.05

# The processes of a server with this environment hang in their next step after SIGUSR1: they compute for ever.
HANGS_ON_SIGNAL = {"PYTHONPATH": str(Path(__file__).parent.parent / "tests" / "support" / "hang_on_signal")}


async def longest_pause(url: str, streams: int, tokens: int, victim: Callable[[Any], int]) -> float:
    """Return the longest time between two chunks of any stream, in seconds.

    Args:
        tokens: the length of each stream. After an eighth of all tokens a process is killed.
        victim: the number of this process, from the status of the server.
    """
    came = [0]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        tasks = [asyncio.create_task(_longest_gap(session, url, number, tokens, came)) for number in range(streams)]
        await _arrival(came, streams * tokens // 8, tasks)
        os.kill(victim(status(url)), signal.SIGKILL)
        return max(await asyncio.gather(*tasks))


async def _arrival(came: Sequence[int], count: int, tasks: Sequence["asyncio.Task[float]"]) -> None:
    """Wait until `count` chunks have come. Raises the error of a stream that fails before."""
    while came[0] < count:
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.01)


async def _longest_gap(session: aiohttp.ClientSession, url: str, number: int, tokens: int, came: list[int]) -> float:
    # Token ids, since a model with made-up weights has no tokenizer.
    prompt = [3 + number, *range(4, 16)]
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "return_token_ids": True}
    longest, last = 0.0, time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
                came[0] += 1
                assert b'"error"' not in line[:16], line
    return longest


async def hang(url: str, streams: int, tokens: int, victim: Callable[[Any], int]) -> tuple[float, float]:
    """Have a rank hang in a step while streams run.

    Args: those of `longest_pause`. The server has the environment HANGS_ON_SIGNAL.

    Returns:
        The seconds until /health answers 503, and the seconds until the streams go on.
    """
    came = [0]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        tasks = [asyncio.create_task(_longest_gap(session, url, number, tokens, came)) for number in range(streams)]
        await _arrival(came, streams * tokens // 8, tasks)
        os.kill(victim(status(url)), signal.SIGUSR1)
        begun = time.perf_counter()
        while await _health(session, url) == 200:
            await asyncio.sleep(_POLL_S)
        unhealthy, last = time.perf_counter() - begun, came[0]
        while came[0] == last:
            await asyncio.sleep(_POLL_S)
        went_on = time.perf_counter() - begun
        await asyncio.gather(*tasks)
        return unhealthy, went_on


async def _health(session: aiohttp.ClientSession, url: str) -> int:
    async with session.get(f"{url}/health") as answer:
        return answer.status


def status(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/v1/admin/status") as answer:
        return json.load(answer)


def settle(url: str) -> None:
    """Wait until all replicas are ready, and their ranks have told their process numbers."""
    deadline = time.monotonic() + _SETTLE_S
    while any(not _is_settled(replica) for replica in status(url)["replicas"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_settled(replica: Any) -> bool:
    ranks = replica["state"] == "ready" and replica["stats"]["ranks"]
    return bool(ranks) and all(os.path.exists(f"/proc/{rank['pid']}") for rank in ranks)
