"""`shoal bench`: what a layout delivers on this machine. JSON on stdout, or in a file."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shoal.cli.options import GroupedCommand, engine_flags, engine_values
from shoal.errors import EngineError, UserError
from shoal.frontend.llm import LLM
from shoal.frontend.measure import Meter, Shape, medians
from shoal.frontend.model import open_model

_READY = "ready: "


@click.group()
def bench() -> None:
    """Measure throughput, latency and start-up.

    MODEL is a folder, an id on the hub, or shape:NAME: a real model's sizes with made-up weights, such as
    shape:qwen3-0.6b or shape:llama-10m.
    """


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="write JSON to this file")(
        engine_flags(command)
    )
    command = click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="measured runs")(
        command
    )
    return click.argument("model", required=False)(command)


def _lengths(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--temperature", type=float, default=0.0, show_default=True)(command)
    command = click.option("--output-len", type=click.IntRange(2), default=64, show_default=True)(command)
    return click.option("--input-len", type=click.IntRange(1), default=128, show_default=True)(command)


@bench.command(cls=GroupedCommand)
@click.option(
    "--num-prompts", type=click.IntRange(1), default=64, show_default=True, help="requests that arrive together"
)
@_lengths
@_common
def throughput(num_prompts: int, **rest: Any) -> None:
    """Tokens a second with many requests at once."""
    _batches("throughput", [num_prompts], **rest)


@bench.command(cls=GroupedCommand)
@click.option(
    "--batch-size", "batch_sizes", type=click.IntRange(1), multiple=True, default=(1, 8, 32), show_default=True
)
@_lengths
@_common
def latency(batch_sizes: tuple[int, ...], **rest: Any) -> None:
    """Time to the first token and time a token, batch by batch."""
    _batches("latency", list(batch_sizes), **rest)


def _batches(
    name: str,
    batch_sizes: list[int],
    *,
    model: str | None,
    input_len: int,
    output_len: int,
    temperature: float,
    repeat: int,
    output: Path | None,
    **flags: Any,
) -> None:
    options = {"max_model_len": input_len + output_len, **engine_values(flags)}
    with LLM(open_model(model, options, own_process=True)) as llm:
        meter = Meter(llm.engine, llm.vocab_size, temperature=temperature)
        results = []
        for batch_size in batch_sizes:
            shape = Shape(batch_size, input_len, output_len)
            meter.run(Shape(batch_size, input_len, 2))  # sizes that were not seen before cost more the first time
            runs = [meter.run(shape) for _ in range(repeat)]
            results.append({"batch_size": batch_size, **medians(runs)})
        stats = llm.stats()
    report = {
        "benchmark": name,
        "model": model or "bundled",
        "input_len": input_len,
        "output_len": output_len,
        "repeat": repeat,
        "options": options,
        "start_s": dict(stats.start_s),
        "results": results,
        "ranks": [
            {
                "rank": rank.rank,
                "weight_bytes": rank.weight_bytes,
                "kv_bytes": rank.kv_bytes,
                "memory_bytes": rank.anonymous - rank.anonymous_at_import - rank.kv_bytes,
            }
            for rank in stats.ranks
        ],
    }
    _write(report, output)


@bench.command(cls=GroupedCommand)
@click.option("--probe", is_flag=True, hidden=True)
@_common
def startup(model: str | None, repeat: int, output: Path | None, probe: bool, **flags: Any) -> None:
    """Seconds from the command's start until requests can be taken, phase by phase."""
    if probe:
        with LLM(open_model(model, engine_values(flags), own_process=True)) as llm:
            print(_READY + json.dumps(dict(llm.stats().start_s)), flush=True)
        return
    runs = [_start_once() for _ in range(repeat)]
    phases = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    _write({"benchmark": "startup", "model": model or "bundled", "repeat": repeat, "seconds": phases}, output)


def _start_once() -> dict[str, float]:
    """This command again, in a process of its own."""
    command = [sys.executable, "-m", "shoal.cli.main", *sys.argv[1:], "--probe"]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if process.stdout is None:
            raise EngineError("the probe has no output")
        for line in process.stdout:
            if line.startswith(_READY):
                ready = time.monotonic() - begun
                return {"ready": ready, **json.loads(line.removeprefix(_READY))}
    raise EngineError(f"{' '.join(command)} ended with code {process.returncode} before it was ready")


def _write(report: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(report, indent=2)
    if output is None:
        print(text)
        return
    try:
        output.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror}") from None
