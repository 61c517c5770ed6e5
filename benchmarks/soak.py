"""Serve many streaming clients for some time: `python benchmarks/soak.py [--clients 256] [--seconds 60]` prints JSON.

The server has the bundled model. Each client streams one completion after the other, with random lengths, and
disconnects in the middle of one in eight. The report has the errors, the memory of the server process (the last quarter
of the time and the second), and the KV blocks that are still held at the end.
"""

import asyncio
import json
import random
import statistics
import time
import urllib.request
from typing import Any

import aiohttp
import click

from running_server import RunningServer, start_server, stream

_SAMPLE_S = 0.5
_REST_S = 20.0


async def _client(session: aiohttp.ClientSession, url: str, number: int, until: float, counts: dict[str, Any]) -> None:
    draw = random.Random(number)
    while time.monotonic() < until:
        first = draw.randrange(1, 500)
        body = {
            "prompt": f"Count from {first} to {first + draw.randrange(2, 40)}:",
            "max_tokens": draw.randrange(8, 120),
            "temperature": draw.choice((0.0, 1.0)),
            "ignore_eos": draw.random() < 0.5,
        }
        try:
            if draw.random() < 0.125:
                await _leave_early(session, url, body)
                counts["left"] += 1
            else:
                answer = await stream(session, url, body)
                counts["requests"] += 1
                counts["tokens"] += answer.tokens
        except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
            counts["errors"].append(str(error) or type(error).__name__)


async def _leave_early(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as answer:
        await answer.content.readline()
        answer.close()


async def _run(server: RunningServer, clients: int, seconds: float) -> dict[str, Any]:
    counts: dict[str, Any] = {"requests": 0, "tokens": 0, "left": 0, "errors": []}
    samples: list[int] = []

    async def watch() -> None:
        while True:
            samples.append(server.memory())
            await asyncio.sleep(_SAMPLE_S)

    until = time.monotonic() + seconds
    timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(_client(session, server.url, number, until, counts) for number in range(clients)))
        watcher.cancel()
    quarter = len(samples) // 4
    second, last = (statistics.mean(samples[i * quarter : (i + 1) * quarter]) for i in (1, 3))
    return counts | {
        "errors": len(counts["errors"]),
        "first_errors": counts["errors"][:3],
        "tokens_per_s": counts["tokens"] / seconds,
        "memory_second_quarter_bytes": second,
        "memory_last_quarter_bytes": last,
        "memory_growth": last / second - 1,
        "blocks_taken_at_the_end": _blocks_taken(server.url),
    }


def _blocks_taken(url: str) -> int:
    """Return the KV blocks that are held once the engine is idle. Cached blocks count as free."""
    deadline = time.monotonic() + _REST_S
    while True:
        with urllib.request.urlopen(f"{url}/v1/admin/status") as answer:
            replicas = json.load(answer)["replicas"]
        taken = sum(replica["stats"]["num_blocks"] - replica["stats"]["free_blocks"] for replica in replicas)
        if not taken or time.monotonic() > deadline:
            return int(taken)
        time.sleep(_SAMPLE_S)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--clients", default=256, show_default=True)
@click.option("--seconds", default=60.0, show_default=True)
@click.argument("rest", nargs=-1)
def main(clients: int, seconds: float, rest: tuple[str, ...]) -> None:
    """Run the clients. REST are options of the server."""
    with start_server(None, *rest) as server:
        print(json.dumps({"clients": clients, **asyncio.run(_run(server, clients, seconds))}, indent=2))


if __name__ == "__main__":
    main()
