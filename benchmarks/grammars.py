"""Measure how much structured outputs slow down other requests. Prints JSON.

    python benchmarks/grammars.py beside [--outputs 32]     # a stream beside outputs that obey an ambiguous grammar
    python benchmarks/grammars.py fuzz [--minutes 5]        # random and hostile grammars, beside a stream

`beside` measures the speed of one plain stream beside a number of plain outputs, and beside as many outputs that obey
`e: e e | "a"`. Every text has many parses in this grammar, and the work for one more token grows with the square of the
tokens before it.

`fuzz` sends random schemas, expressions and grammars, and hostile ones that crash llguidance or take very long. It
fails if a process of the server dies, if an answer is neither an output nor a refusal, or if an answer takes longer
than the limits allow.
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import click

from running_server import RunningServer, start_server

AMBIGUOUS = 'start: e\ne: e e | "a"\n'
_LIMIT_S = 90.0  # the limits of a compilation and a verdict, and the wait for earlier ones
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_read=300)


async def _arrivals(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], until: asyncio.Event
) -> list[float]:
    """Run one stream after the other until the event is set, and return the times at which chunks came."""
    times: list[float] = []
    while not until.is_set():
        async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if until.is_set():
                    break
                if line.startswith(b"data: {"):
                    times.append(time.perf_counter())
    return times


async def _beside(server: RunningServer, load: dict[str, Any]) -> dict[str, float]:
    """Measure a stream while the request `load` runs."""
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        over = asyncio.Event()
        watched = {"prompt": "Count from 1 to 99:", "max_tokens": 900, "temperature": 0, "ignore_eos": True}
        watching = asyncio.create_task(_arrivals(session, server.url, watched, over))
        await asyncio.sleep(1.0)
        begun = time.perf_counter()
        async with session.post(f"{server.url}/v1/completions", json=load) as answer:
            answer.raise_for_status()
            tokens = (await answer.json())["usage"]["completion_tokens"]
        ended = time.perf_counter()
        over.set()
        times = [at for at in await watching if begun <= at <= ended]
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    return {
        "stream_tokens_per_s": len(times) / (ended - begun),
        "median_gap_ms": statistics.median(gaps) * 1e3,
        "largest_gap_ms": gaps[-1] * 1e3,
        "load_tokens_per_s": tokens / (ended - begun),
    }


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.option("--outputs", default=32, show_default=True)
@click.option("--tokens", default=300, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def beside(outputs: int, tokens: int, rounds: int) -> None:
    plain = {"prompt": "x", "n": outputs, "max_tokens": tokens, "temperature": 1, "ignore_eos": True}
    loads = {"plain": plain, "ambiguous": plain | {"guided_grammar": AMBIGUOUS}}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
    with start_server(None) as server:
        for _ in range(rounds):
            for name, load in loads.items():
                results[name].append(asyncio.run(_beside(server, load)))
    medians = {
        name: {key: statistics.median(each[key] for each in found) for key in found[0]}
        for name, found in results.items()
    }
    slower = medians["plain"]["stream_tokens_per_s"] / medians["ambiguous"]["stream_tokens_per_s"]
    print(json.dumps({"outputs": outputs, **medians, "stream_slower_by": slower}, indent=2))


# --- fuzzing -------------------------------------------------------------------------------------------------------

_NUMBERS = (0, 1, -1, 0.1, 1e-9, 7, 1000003, 9999991, 2**53 + 1, 2**63, -(2**63), 2**64, 1e300, -9.3e18)
_TYPES = ("integer", "number", "string", "boolean", "null", "object", "array")
_FORMATS = ("date-time", "uuid", "email", "ipv4", "password", "nothing")
_PATTERNS = ("[a-z]+", "^a.*b$", "(a|b)*a(a|b){20}", "(?=a)b", "\\p{L}{3}", "(a?){50}a{50}", "[")


class Fuzz:
    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def body(self) -> dict[str, Any]:
        kind = self._draw.choice(("json", "json", "json", "regex", "grammar", "choice", "hostile"))
        value: Any
        match kind:
            case "json":
                value = self.schema(4)
            case "regex":
                value = self.regex(4)
            case "choice":
                value = [self.text() for _ in range(self._draw.choice((1, 3, 200)))]
            case "grammar":
                value = self.grammar()
            case _:
                kind, value = self.hostile()
        return {f"guided_{kind}": value, "prompt": "x", "max_tokens": self._draw.choice((1, 8, 60)), "temperature": 1}

    def text(self) -> str:
        return "".join(self._draw.choice('ab"\\\n é漢😀{}[]') for _ in range(self._draw.randrange(1, 9)))

    def schema(self, depth: int) -> Any:
        draw = self._draw
        kind = draw.choice(_TYPES)
        found: dict[str, Any] = {"type": kind}
        if draw.random() < 0.15:
            return draw.choice(({"const": draw.choice(_NUMBERS)}, {"enum": [self.text(), draw.choice(_NUMBERS)]}, True))
        if draw.random() < 0.2 and depth:
            word = draw.choice(("anyOf", "oneOf", "allOf"))
            return {word: [self.schema(depth - 1) for _ in range(draw.randrange(1, 4))]}
        if draw.random() < 0.1:
            return {"$ref": draw.choice(("#", "#/$defs/a", "#a", "https://example.com/x"))}
        if kind in ("integer", "number"):
            for word in ("minimum", "maximum", "exclusiveMinimum", "multipleOf"):
                if draw.random() < 0.3:
                    found[word] = draw.choice(_NUMBERS)
        elif kind == "string":
            for word, values in {
                "pattern": _PATTERNS, "format": _FORMATS, "minLength": (0, 5, 3000), "maxLength": (1, 9, 10**6)
            }.items():  # fmt: skip
                if draw.random() < 0.3:
                    found[word] = draw.choice(values)
        elif kind == "array" and depth:
            found |= {"items": self.schema(depth - 1), "minItems": draw.choice((0, 1, 50)), "uniqueItems": True}
        elif kind == "object" and depth:
            names = [self.text() for _ in range(draw.choice((0, 1, 4, 30)))]
            found["properties"] = {name: self.schema(depth - 2 if depth > 1 else 0) for name in names}
            found["required"] = names[: draw.randrange(len(names) + 1)]
            found["additionalProperties"] = draw.choice((True, False))
        if depth == 4:
            found["$defs"] = {"a": self.schema(1)}
        return found

    def regex(self, depth: int) -> str:
        draw = self._draw
        if not depth or draw.random() < 0.2:
            return draw.choice((*_PATTERNS, "a", ".", "[^x]"))
        inner = self.regex(depth - 1)
        return draw.choice(
            (f"({inner})*", f"({inner}|{self.regex(depth - 1)})", f"({inner}){{0,{draw.choice((3, 99))}}}")
        )

    def grammar(self) -> str:
        draw = self._draw
        names = [f"r{i}" for i in range(draw.choice((1, 4, 40)))]

        def side() -> str:
            return " ".join(draw.choice((*names, '"a"', '"b"', "/[a-c]+/")) for _ in range(draw.randrange(1, 4)))

        rules = [f'{name}: {" | ".join(side() for _ in range(draw.randrange(1, 4)))} | "x"' for name in names]
        return "\n".join([f"start: {names[0]}", *rules])

    def hostile(self) -> tuple[str, Any]:
        count = self._draw.choice((100, 1000, 5000, 20000))
        chained = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
        nested: Any = {}
        for _ in range(min(count, 60)):
            nested = {"type": "object", "properties": {"a": nested}, "required": ["a"]}
        return self._draw.choice(
            (
                ("json", {"const": -(2**63)}),
                ("json", {"type": "integer", "multipleOf": self._draw.choice((1000003, 9999991, 10**15 + 37))}),
                ("json", {"$ref": "#/$defs/a0", "$defs": {**chained, f"a{count}": {"type": "integer"}}}),
                ("json", nested),
                ("grammar", "\n".join(["start: r0", *(f"r{i}: r{i + 1}" for i in range(count)), f'r{count}: "x"'])),
                ("grammar", AMBIGUOUS),
                ("grammar", 'start: a\na: a a a | a a | "a" |\n'),
                ("regex", "(" * count + "a" + ")" * count),
                ("regex", "(a|b|ab)*" * count),
                ("choice", [f"label {i}" for i in range(count)]),
            )
        )


def _children(pid: int) -> set[int]:
    found = set()
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        found |= {int(child) for child in tasks.read_text().split()}
    return found


async def _fuzz(server: RunningServer, seed: int, until: float, clients: int) -> dict[str, Any]:
    answers: Counter[str] = Counter()
    slow: list[tuple[float, str]] = []
    wrong: list[str] = []

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        fuzz = Fuzz(seed * 1000 + number)
        while time.monotonic() < until:
            body, begun = fuzz.body(), time.monotonic()
            async with session.post(f"{server.url}/v1/completions", json=body) as answer:
                text = await answer.text()
            seconds = time.monotonic() - begun
            answers[str(answer.status)] += 1
            slow.append((seconds, json.dumps(body)[:120]))
            if answer.status not in (200, 400, 413, 422, 429) or seconds > _LIMIT_S:
                wrong.append(f"{answer.status} after {seconds:.1f} s: {text[:200]} for {json.dumps(body)[:300]}")

    over = asyncio.Event()
    watched = {"prompt": "Count from 1 to 99:", "max_tokens": 900, "temperature": 0, "ignore_eos": True}
    before = _children(server.process.pid)
    async with aiohttp.ClientSession(timeout=_TIMEOUT, connector=aiohttp.TCPConnector(limit=0)) as session:
        watching = asyncio.create_task(_arrivals(session, server.url, watched, over))
        await asyncio.gather(*(client(session, number) for number in range(clients)))
        over.set()
        times = await watching
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    return {
        "answers": dict(answers),
        "wrong": wrong[:10],
        "wrong_count": len(wrong),
        "died": sorted(before - _children(server.process.pid)),
        "slowest_s": sorted(slow, reverse=True)[:5],
        "stream_median_gap_ms": statistics.median(gaps) * 1e3,
        "stream_p99_gap_ms": gaps[int(len(gaps) * 0.99)] * 1e3,
        "stream_largest_gap_ms": gaps[-1] * 1e3,
    }


@main.command()
@click.option("--minutes", default=5.0, show_default=True)
@click.option("--clients", default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
def fuzz(minutes: float, clients: int, seed: int) -> None:
    with start_server(None) as server:
        found = asyncio.run(_fuzz(server, seed, time.monotonic() + minutes * 60, clients))
    print(json.dumps({"minutes": minutes, "clients": clients, **found}, indent=2, ensure_ascii=False))
    if found["wrong_count"] or found["died"]:
        raise SystemExit(1)


if __name__ == "__main__":
    os.environ.setdefault("SHOAL_LOG_LEVEL", "warning")
    main()
