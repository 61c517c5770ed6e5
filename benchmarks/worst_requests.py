"""Measure how long a stream stands still while other clients send the most expensive legal requests.

`python benchmarks/worst_requests.py` prints JSON, or a table with `--markdown`. A server with its default limits has a
tiny model with a vocabulary of 151,936 (random weights), so that little of the time is arithmetic. A separate process
streams from it without a pause, while the expensive requests run one after the other. The report has the largest time
between two chunks of the stream for each request, the median over the rounds, and the largest time without other
requests.
"""

import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import click

import shoal
from running_server import start_server

_VOCABULARY = 151_936
_LENGTH = 8192
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": _VOCABULARY,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": _LENGTH, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "dtype": "float32", "eos_token_id": 1,
}  # fmt: skip
_LOOPS = "{% for i in range(1900) %}{% for j in range(1000) %}{% endfor %}{% endfor %}Hello"
_IDLE_S = 3.0
_AFTER_S = 0.5  # after an answer, while the server may still clean up after the request
_CASE_S = 120.0
_SETTLE_S = 60.0
_PART = 1 << 16  # bytes of a body that are sent at a time
_SIZE = 30_000_000


@dataclass(frozen=True, slots=True)
class Case:
    """A request, which is sent `count` times at once."""

    name: str
    path: str
    make: Callable[[], bytes]
    count: int = 1
    headers: tuple[tuple[str, str], ...] = ()


def _completion(**fields: Any) -> Callable[[], bytes]:
    return lambda: json.dumps({"prompt": "Hello", "max_tokens": 4, **fields}).encode()


def _chat(**fields: Any) -> Callable[[], bytes]:
    messages = [{"role": "user", "content": "Hello"}]
    return lambda: json.dumps({"messages": messages, "max_tokens": 4, **fields}).encode()


def _with_unknown_field(make: Callable[[], str]) -> Callable[[], bytes]:
    """Return a function that makes a completion with an unknown field, whose value `make` writes."""
    return lambda: b'{"prompt":"Hello","max_tokens":4,"x":%s}' % make().encode()


def _repeated(count: int) -> list[int]:
    return [5 + i % 2 for i in range(count)]


def _distinct(count: int) -> list[int]:
    return [i % _VOCABULARY for i in range(count)]


def _words(count: int, length: int = 8) -> list[str]:
    return [f"{i:0{length}d}" for i in range(count)]


def _tools(count: int) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
    return [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(count)]


def _lists_of_ids() -> list[Case]:
    found = []
    for field in ("allowed_token_ids", "stop_token_ids"):
        for what, ids in (("repeated", _repeated(300_000)), ("distinct", _distinct(300_000))):
            found.append(Case(f"{field}, 300,000 {what}", "/v1/completions", _completion(**{field: ids})))
        full = _distinct(_VOCABULARY)
        found.append(Case(f"{field}, all, n 16", "/v1/completions", _completion(**{field: full}, n=16, max_tokens=64)))
        found.append(Case(f"{field}, all, n 2,048", "/v1/completions", _completion(**{field: full}, n=2048)))
        found.append(
            Case(f"{field}, 3,500,000 repeated", "/v1/completions", _completion(**{field: _repeated(3_500_000)}))
        )
        found.append(Case(f"{field}, 2,000,000 wrong", "/v1/completions", _completion(**{field: ["a"] * 2_000_000})))
    ends = _distinct(_VOCABULARY)
    return [
        *found,
        Case(
            "stop_token_ids, all, min_tokens, n 16",
            "/v1/completions",
            _completion(stop_token_ids=ends, min_tokens=64, max_tokens=64, n=16),
        ),
    ]


def _biases() -> list[Case]:
    full = {str(i): 1 for i in range(_VOCABULARY)}
    many = {str(i): 1 for i in range(1_900_000)}
    return [
        Case("logit_bias, all", "/v1/completions", _completion(logit_bias=full, max_tokens=64)),
        Case("logit_bias, all, n 16", "/v1/completions", _completion(logit_bias=full, n=16, max_tokens=64)),
        Case("logit_bias, all, n 2,048", "/v1/completions", _completion(logit_bias=full, n=2048)),
        Case("logit_bias, 1,900,000", "/v1/completions", _completion(logit_bias=many)),
        Case(
            "logit_bias, 1,000,000 wrong",
            "/v1/completions",
            _completion(logit_bias={f"x{i}": "y" for i in range(1_000_000)}),
        ),
    ]


def _texts() -> list[Case]:
    return [
        Case("stop, 1,024 texts, n 2,048", "/v1/completions", _completion(stop=_words(1024), n=2048)),
        Case(
            "stop, 1,024 of 64 characters, n 128, 256 tokens",
            "/v1/completions",
            _completion(stop=_words(1024, 64), n=128, max_tokens=256, ignore_eos=True),
        ),
        Case("stop, 65,536 characters", "/v1/completions", _completion(stop=["a" * 65_536], max_tokens=256)),
        Case("bad_words, 1,024, n 16", "/v1/completions", _completion(bad_words=_words(1024), n=16, max_tokens=64)),
        Case("bad_words, 1,024, n 2,048", "/v1/completions", _completion(bad_words=_words(1024), n=2048)),
        Case("bad_words, 3,000,000", "/v1/completions", _completion(bad_words=["a"] * 3_000_000)),
    ]


def _prompts() -> list[Case]:
    long = _distinct(_LENGTH - 8)
    return [
        Case("2,048 prompts", "/v1/completions", _completion(prompt=["Hello"] * 2048)),
        Case("2,048 prompts, 1,024 stops", "/v1/completions", _completion(prompt=["Hello"] * 2048, stop=_words(1024))),
        Case(
            "2,048 prompts, 150,000 allowed",
            "/v1/completions",
            _completion(prompt=["Hello"] * 2048, allowed_token_ids=_distinct(150_000)),
        ),
        Case("2,048 prompts of 1,600 ids", "/v1/completions", _completion(prompt=[long[:1600]] * 2048, max_tokens=1)),
        Case("the longest prompt, ids", "/v1/completions", _completion(prompt=long)),
        Case("the longest prompt, n 2,048", "/v1/completions", _completion(prompt=long, n=2048, max_tokens=1)),
        Case("the longest prompt, text", "/v1/completions", _completion(prompt="hello " * 3000)),
        Case("a prompt of 1,000,000 ids", "/v1/completions", _completion(prompt=_distinct(1_000_000))),
        Case("a prompt of 3,900,000 ids", "/v1/completions", _completion(prompt=_repeated(3_900_000))),
        Case("1,000,000 a", "/v1/completions", _completion(prompt="a" * 1_000_000)),
        Case("100,000 emoji", "/v1/completions", _completion(prompt="\U0001f600" * 100_000)),
        Case("a prompt of 30 MB", "/v1/completions", _completion(prompt="hello " * (_SIZE // 6))),
        Case(
            "priority, penalties, the longest prompt, n 64",
            "/v1/completions",
            _completion(
                prompt=long[:6000], n=64, max_tokens=64, priority=-5, presence_penalty=1, frequency_penalty=1,
                repetition_penalty=1.1, ignore_eos=True,
            ),
        ),
    ]  # fmt: skip


def _logprobs() -> list[Case]:
    long = _distinct(_LENGTH - 8)
    whole = {"ignore_eos": True, "logprobs": 20}
    return [
        Case("logprobs -1", "/v1/completions", _completion(logprobs=-1)),
        Case("logprobs 20, n 64, 256 tokens", "/v1/completions", _completion(**whole, n=64, max_tokens=256)),
        Case("logprobs 20, n 64, streamed", "/v1/completions", _completion(**whole, n=64, max_tokens=256, stream=True)),
        Case(
            "echo, prompt_logprobs 20, the longest prompt",
            "/v1/completions",
            _completion(prompt=long, echo=True, logprobs=20, prompt_logprobs=20),
        ),
        Case(
            "echo, prompt_logprobs 20, n 16, streamed",
            "/v1/completions",
            _completion(prompt=long[:4000], echo=True, logprobs=20, prompt_logprobs=20, n=16, stream=True),
        ),
        Case(
            "top_logprobs 20, n 64, 256 tokens",
            "/v1/chat/completions",
            _chat(logprobs=True, top_logprobs=20, n=64, max_tokens=256, ignore_eos=True),
        ),
        Case("n 2,048, 16 tokens", "/v1/completions", _completion(n=2048, max_tokens=16, ignore_eos=True)),
        Case(
            "n 2,048, 16 tokens, streamed",
            "/v1/completions",
            _completion(n=2048, max_tokens=16, ignore_eos=True, stream=True),
        ),
        Case("n 2,048, ended by a stop", "/v1/completions", _completion(n=2048, max_tokens=16, stop=["e", "a", "1"])),
    ]


def _bodies() -> list[Case]:
    deep = "[" * 120 + "]" * 120
    makers: dict[str, Callable[[], str]] = {
        "nested lists, 30 MB": lambda: "[" + f"{deep}," * 1000 + f'"{"a" * _SIZE}"]',
        "a text of 30 MB": lambda: f'"{"a" * _SIZE}"',
        "a text of escapes, 30 MB": lambda: '"' + r"\u00e9" * (_SIZE // 6) + '"',
        "3,700,000 numbers": lambda: "[" + "1234567," * 3_700_000 + "1]",
        "3,700,000 texts": lambda: "[" + '"abcde",' * 3_700_000 + '"a"]',
        "2,000,000 texts with escapes": lambda: "[" + '"ab\\n",' * 2_000_000 + '"a"]',
        "an object of 2,000,000": lambda: json.dumps({f"{i}": "a" for i in range(2_000_000)}),
        "130,000 objects": lambda: "[" + '{"a":1,"b":"cdefgh"},' * 130_000 + "1]",
    }
    return [
        *(Case(name, "/v1/completions", _with_unknown_field(make)) for name, make in makers.items()),
        Case("metadata of a response", "/v1/responses", _metadata),
        Case("30 MB that is no JSON", "/v1/completions", lambda: b'{"prompt":"' + b'a"' * (_SIZE // 2)),
    ]


def _metadata() -> bytes:
    return json.dumps({"input": "Hello", "metadata": {f"{i}": "a" for i in range(1_500_000)}}).encode()


def _chats() -> list[Case]:
    def many(count: int, size: int) -> list[dict[str, str]]:
        return [{"role": "user" if i % 2 == 0 else "assistant", "content": "x" * size} for i in range(count)]

    items = [{"type": "message", "role": "user", "content": "x"} for _ in range(100_000)]
    return [
        Case("100,000 messages", "/v1/chat/completions", _chat(messages=many(100_000, 1))),
        Case("a message of 30 MB", "/v1/chat/completions", _chat(messages=many(1, _SIZE))),
        Case("4,000 tools", "/v1/chat/completions", _chat(tools=_tools(4000))),
        Case("20,000 tools", "/v1/chat/completions", _chat(tools=_tools(20_000))),
        Case(
            "a tool of 20 MB",
            "/v1/chat/completions",
            _chat(tools=[{**_tools(1)[0], "more": {f"{i}": "a" for i in range(1_200_000)}}]),
        ),
        Case(
            "chat_template_kwargs, 1,500,000",
            "/v1/chat/completions",
            _chat(chat_template_kwargs={"x": {f"{i}": "a" for i in range(1_500_000)}}),
        ),
        Case("a template that loops 1,900,000 times", "/v1/chat/completions", _chat(chat_template=_LOOPS)),
        Case("100,000 items", "/v1/responses", lambda: json.dumps({"input": items}).encode()),
        Case("an input of 30 MB", "/v1/responses", lambda: json.dumps({"input": "x" * _SIZE}).encode()),
    ]


def _tokens() -> list[Case]:
    return [
        Case("/tokenize, 30 MB", "/tokenize", lambda: json.dumps({"prompt": "hello " * (_SIZE // 6)}).encode()),
        Case("/tokenize, 3 MB", "/tokenize", lambda: json.dumps({"prompt": "hello " * (_SIZE // 60)}).encode()),
        Case(
            "/tokenize, 1 MB, with texts",
            "/tokenize",
            lambda: json.dumps({"prompt": "hello " * 170_000, "return_token_strs": True}).encode(),
        ),
        Case("/tokenize, 1,000,000 a", "/tokenize", lambda: json.dumps({"prompt": "a" * 1_000_000}).encode()),
        Case("/detokenize, 1,000,000", "/detokenize", lambda: json.dumps({"tokens": [300] * 1_000_000}).encode()),
        Case("/detokenize, 3,900,000", "/detokenize", lambda: json.dumps({"tokens": [300] * 3_900_000}).encode()),
    ]


def _together() -> list[Case]:
    head = (("X-A", "a" * 7000), ("X-B", "b" * 7000))
    return [
        Case(
            "16 bodies of 30 MB at once",
            "/v1/completions",
            _with_unknown_field(lambda: "[" + "1234567," * 3_700_000 + "1]"),
            16,
        ),
        Case("8 times 1,024 stops, n 2,048", "/v1/completions", _completion(stop=_words(1024), n=2048), 8),
        Case("8 prompts of 1,000,000 ids", "/v1/completions", _completion(prompt=_distinct(1_000_000)), 8),
        Case("8 times /tokenize, 3 MB", "/tokenize", lambda: json.dumps({"prompt": "hi " * 1_000_000}).encode(), 8),
        Case("large headers", "/v1/completions", _completion(), 1, head),
    ]


def _structured() -> list[Case]:
    """Return the cases of structured outputs, whose grammars are compiled in other processes."""
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": wide}}
    return [
        Case("response_format, 5,000 properties", "/v1/completions", _completion(response_format=format_)),
        Case("guided_choice, 20,000", "/v1/completions", _completion(guided_choice=_words(20_000))),
        Case("guided_regex", "/v1/completions", _completion(guided_regex="(a|b|ab){1,1000}c")),
    ]


@contextmanager
def _model() -> Iterator[Path]:
    bundled = Path(shoal.__file__).parent / "demo_model"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_CONFIG))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bundled / name, folder)
        yield Path(folder)


class _Watcher:
    """A process that streams without a pause, and reports the largest gap."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--watch", url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._read() == "streaming"

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def mark(self) -> float:
        """Return the largest gap since the last mark, in seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


async def _watch(url: str) -> None:
    """Run one stream after the other, and print the largest gap for each line on stdin.

    The time between two streams does not count.
    """
    worst, last = 0.0, 0.0
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    # With log-probabilities each token is a chunk, even one without text.
    body = {"prompt": "Once", "max_tokens": _LENGTH - 64, "ignore_eos": True, "stream": True, "logprobs": 0}

    async def stream() -> None:
        nonlocal worst, last
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
            while True:
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    last = 0.0
                    async for line in answer.content:
                        if line.startswith(b"data: {"):
                            now = time.perf_counter()
                            if last:
                                worst = max(worst, now - last)
                            else:
                                begun.set()
                            last = now
                last = 0.0

    begun = asyncio.Event()
    streaming = asyncio.create_task(stream())
    await begun.wait()
    print("streaming", flush=True)
    while await reader.readline():
        now = time.perf_counter()
        print(max(worst, now - last if last else 0.0), flush=True)
        worst, last = 0.0, now if last else 0.0
        if streaming.done():
            streaming.result()
    streaming.cancel()


async def _parts(body: bytes) -> Any:
    for start in range(0, len(body), _PART):
        yield body[start : start + _PART]


async def _ask(session: aiohttp.ClientSession, url: str, case: Case, body: bytes) -> str:
    """Send a request. Return the status, or the name of the error."""
    headers = {"content-type": "application/json", "content-length": str(len(body)), **dict(case.headers)}
    try:
        async with session.post(url + case.path, data=_parts(body), headers=headers) as answer:
            async for _ in answer.content.iter_chunked(1 << 20):
                pass
            return str(answer.status)
    except TimeoutError:
        return "timeout"
    except aiohttp.ClientError as error:
        return type(error).__name__


async def _run(url: str, case: Case) -> tuple[str, float]:
    body = case.make()
    begun = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=_CASE_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        found = await asyncio.gather(*(_ask(session, url, case, body) for _ in range(case.count)))
        await session.get(f"{url}/metrics")
    seconds = time.perf_counter() - begun
    await asyncio.sleep(_AFTER_S)
    return "/".join(sorted(set(found))), seconds


def _measure(url: str, cases: list[Case], rounds: int) -> dict[str, Any]:
    gaps: dict[str, list[float]] = {case.name: [] for case in cases}
    results: dict[str, dict[str, Any]] = {}
    alone: list[float] = []
    watcher = _Watcher(url)
    for _ in range(rounds):
        watcher.mark()
        time.sleep(_IDLE_S)
        alone.append(watcher.mark())
        for case in cases:
            watcher.mark()
            status, seconds = asyncio.run(_run(url, case))
            gaps[case.name].append(watcher.mark())
            results[case.name] = {"answer": status, "seconds": round(seconds, 2)}
            print(f"{case.name}: {status}, {seconds:.2f} s, gap {gaps[case.name][-1]:.3f} s", file=sys.stderr)
    watcher.close()
    worst = {
        name: {
            "gap_s": round(statistics.median(each), 3),
            "all_gaps_s": [round(gap, 3) for gap in each],
            **results[name],
        }
        for name, each in gaps.items()
    }
    return {"alone_gap_s": round(statistics.median(alone), 3), "cases": worst}


def _table(found: dict[str, Any]) -> str:
    rows = [f"| {name} | {each['answer']} | {each['seconds']} | {each['gap_s']} |" for name, each in found.items()]
    return "\n".join(["| request | answer | time, s | largest gap, s |", "|---|---|---|---|", *rows])


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--only", default="", help="run only cases whose names contain this")
@click.option("--structured", is_flag=True, help="also run cases of structured outputs")
@click.option("--markdown", is_flag=True)
@click.option("--watch", hidden=True)
def main(rounds: int, only: str, structured: bool, markdown: bool, watch: str | None) -> None:
    if watch:
        asyncio.run(_watch(watch))
        return
    groups = [_lists_of_ids, _biases, _texts, _prompts, _logprobs, _bodies, _chats, _tokens, _together]
    cases = [case for group in groups + [_structured] * structured for case in group() if only in case.name]
    flags = ("--load-format", "dummy", "--tool-call-parser", "hermes", "--trust-request-chat-template")
    with _model() as folder, start_server(folder, *flags) as server:
        found = _measure(server.url, cases, rounds)
    if markdown:
        print(_table({"none": {"answer": "", "seconds": "", "gap_s": found["alone_gap_s"]}, **found["cases"]}))
    else:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
