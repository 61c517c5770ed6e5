"""Measure the cost of HTTP and streaming: `python benchmarks/serving.py` prints JSON.

The same prompts run through `LLM.generate` and through `shoal serve` with `--streams` at a time, in turn, `--rounds`
times. Ratios are computed round by round, and figures are medians. The model has random weights with the sizes of
Qwen3-0.6B in bfloat16.
"""

import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from checkpoint import make
from running_server import start_server, stream_all

_SHAPE = "shape:qwen3-0.6b"
_VOCABULARY = 150_000


def _prompts(count: int, length: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(10, _VOCABULARY) for _ in range(length)] for _ in range(count)]


def _offline(model: str, count: int, input_len: int, output_len: int, streams: int, rest: Sequence[str]) -> float:
    """Return the output tokens per second of `LLM.generate`, in a separate process and after a warm-up."""
    arguments = json.dumps([model, count, input_len, output_len, streams, list(rest)])
    done = subprocess.run(
        [sys.executable, __file__, "--inner", arguments], stdout=subprocess.PIPE, check=True, text=True
    )
    return float(done.stdout.splitlines()[-1])


def _run_offline(model: str, count: int, input_len: int, output_len: int, streams: int, rest: Sequence[str]) -> float:
    from shoal import LLM, SamplingParams

    options = {name[2:].replace("-", "_"): int(value) for name, value in zip(rest[::2], rest[1::2], strict=True)}
    with LLM(model, max_num_seqs=streams, **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        given: list[Any] = [{"prompt_token_ids": prompt} for prompt in _prompts(count + streams, input_len)]
        llm.generate(given[count:], params, use_tqdm=False)
        begun = time.perf_counter()
        llm.generate(given[:count], params, use_tqdm=False)
        return count * output_len / (time.perf_counter() - begun)


def _online(
    model: str, count: int, input_len: int, output_len: int, streams: int, rest: Sequence[str]
) -> dict[str, float]:
    body = {"temperature": 0, "max_tokens": output_len, "ignore_eos": True}
    bodies = [{**body, "prompt": prompt} for prompt in _prompts(count + streams, input_len)]
    with start_server(model, "--max-num-seqs", str(streams), *rest) as server:
        asyncio.run(stream_all(server.url, bodies[count:], streams))
        begun = time.perf_counter()
        answers = asyncio.run(stream_all(server.url, bodies[:count], streams))
        seconds = time.perf_counter() - begun
    assert all(answer.tokens == output_len for answer in answers)
    return {
        "output_tokens_per_s": count * output_len / seconds,
        "time_to_first_token_s": statistics.median(answer.first_s for answer in answers),
    }


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--streams", default=32, show_default=True)
@click.option("--num-prompts", default=64, show_default=True)
@click.option("--input-len", default=128, show_default=True)
@click.option("--output-len", default=64, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--inner", hidden=True)
@click.argument("rest", nargs=-1)
def main(
    streams: int, num_prompts: int, input_len: int, output_len: int, rounds: int, inner: str | None, rest: Sequence[str]
) -> None:
    """Compare serving with offline inference. REST are options of both, such as --tensor-parallel-size 2."""
    if inner is not None:
        print(_run_offline(*json.loads(inner)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = str(make(_SHAPE, Path(folder) / "model"))
        sizes = (model, num_prompts, input_len, output_len, streams, rest)
        found = [(_offline(*sizes), _online(*sizes)) for _ in range(rounds)]
    ratios = [online["output_tokens_per_s"] / offline for offline, online in found]
    report = {
        "streams": streams,
        "offline_tokens_per_s": statistics.median(offline for offline, _ in found),
        "served_tokens_per_s": statistics.median(online["output_tokens_per_s"] for _, online in found),
        "time_to_first_token_s": statistics.median(online["time_to_first_token_s"] for _, online in found),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
