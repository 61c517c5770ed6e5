"""Measure how long streams pause when a worker is killed: `python benchmarks/recovery.py [-tp 2]` prints JSON.

The server has the bundled model, and one replica unless options say otherwise. In each round one of its workers is
killed while 32 streams run. The report has the longest time between two chunks of any stream.
"""

import asyncio
import json
import os
import random
import signal
import statistics
import time
import urllib.request
from typing import Any

import aiohttp
import click

from running_server import start_server

_STREAMS = 32
_TOKENS = 400
_SETTLE_S = 60.0


async def _longest_gap(session: aiohttp.ClientSession, url: str, number: int, came: list[int]) -> float:
    body = {"prompt": f"Count from {number} to 90:", "max_tokens": _TOKENS, "ignore_eos": True, "stream": True}
    longest, last = 0.0, time.perf_counter()
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
                came[0] += 1
                assert b'"error"' not in line[:16], line
    return longest


async def _round(url: str, pick: random.Random) -> float:
    came = [0]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        streams = [asyncio.create_task(_longest_gap(session, url, number, came)) for number in range(_STREAMS)]
        while came[0] < _STREAMS * _TOKENS // 8:
            await asyncio.sleep(0.01)
        replica = pick.choice(_status(url)["replicas"])
        os.kill(pick.choice(replica["stats"]["ranks"])["pid"], signal.SIGKILL)
        return max(await asyncio.gather(*streams))


def _status(url: str) -> Any:
    with urllib.request.urlopen(f"{url}/v1/admin/status") as answer:
        return json.load(answer)


def _settle(url: str) -> None:
    deadline = time.monotonic() + _SETTLE_S
    while any(replica["state"] != "ready" or not replica["stats"]["ranks"] for replica in _status(url)["replicas"]):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--rounds", default=5, show_default=True)
@click.argument("rest", nargs=-1)
def main(rounds: int, rest: tuple[str, ...]) -> None:
    """Measure rounds of kills. REST are options of the server."""
    found, pick = [], random.Random(0)
    with start_server(None, *(rest or ("-tp", "2"))) as server:
        for _ in range(rounds):
            _settle(server.url)
            found.append(asyncio.run(_round(server.url, pick)))
    print(json.dumps({"longest_pause_s": found, "median_s": statistics.median(found), "worst_s": max(found)}, indent=2))


if __name__ == "__main__":
    main()
