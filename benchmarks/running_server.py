"""A server in a separate process, and streams from it. Benchmarks of serving use it."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

_START_S = 300.0
_END_S = 60.0


@dataclass(frozen=True, slots=True)
class RunningServer:
    url: str
    process: "subprocess.Popen[bytes]"

    def memory(self) -> int:
        """Return the bytes of anonymous memory of the server process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def start_server(
    model: Path | str | None, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """Start `shoal serve` on a free port and wait until it is ready. End it with SIGTERM."""
    command = [sys.executable, "-m", "shoal", "serve", *([str(model)] if model is not None else [])]
    process = subprocess.Popen(
        [*command, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "SHOAL_LOG_LEVEL": "warning", **(environment or {})},
    )
    try:
        yield RunningServer(_url(process), process)
        process.terminate()
        assert process.wait(_END_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(_END_S)


def _url(process: "subprocess.Popen[bytes]") -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        line = process.stdout.readline().decode()
        if found := re.search(r" at (http\S+)$", line.strip()):
            return found[1]
        if process.poll() is not None:
            break
    raise SystemExit(f"the server did not start (exit code {process.poll()})")


@dataclass(slots=True)
class StreamResult:
    tokens: int = 0  # from the usage that the server reports at the end
    first_s: float = 0.0
    seconds: float = 0.0


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> StreamResult:
    """Run one streaming completion.

    Raises:
        RuntimeError: it is refused or has an error.
    """
    found, begun = StreamResult(), time.perf_counter()
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post(f"{url}/v1/completions", json=asked) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {(await answer.text())[:200]}")
        last = b""
        async for line in answer.content:
            if line.startswith(b"data: {"):
                found.first_s = found.first_s or time.perf_counter() - begun
                last = line
                if b'"error"' in line[:16]:
                    raise RuntimeError(line.decode()[:200])
    found.tokens = json.loads(last[6:])["usage"]["completion_tokens"]
    found.seconds = time.perf_counter() - begun
    return found


async def stream_all(url: str, bodies: Sequence[dict[str, Any]], concurrency: int) -> list[StreamResult]:
    """Run a completion for each body, `concurrency` at a time."""
    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=_START_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(body: dict[str, Any]) -> StreamResult:
            async with gate:
                return await stream(session, url, body)

        return await asyncio.gather(*map(one, bodies))
