"""`shoal bench`: the speed of a layout on this machine, as JSON on stdout or in a file."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from shoal import env
from shoal.bench.engine_speed import BatchShape, SpeedMeter, medians
from shoal.cli.bench_comm import comm
from shoal.cli.bench_serve import serve
from shoal.cli.json_report import write_report
from shoal.cli.numbers import DecimalFloat, IntRange
from shoal.cli.options import GroupedCommand, engine_flags, engine_values
from shoal.errors import EngineError
from shoal.launch import hub, node
from shoal.launch.open_model import open_model
from shoal.llm.comm_profile import profile_replicas, replicas_of
from shoal.llm.llm import LLM
from shoal.process import import_path
from shoal.wire.engine import EngineStats

_READY = "ready: "


@click.group()
def bench() -> None:
    """Measure throughput, latency, start-up and communication.

    MODEL is a folder, an id on the hub, or shape:NAME: the sizes of a real model with random weights, such as
    shape:qwen3-0.6b or shape:llama-10m.
    """


bench.add_command(serve)
bench.add_command(comm)


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="write JSON to this file")(
        engine_flags(command)
    )
    command = click.option(
        "--repeat", type=IntRange(1), default=3, show_default=True, help="measured runs; the median is reported"
    )(command)
    return click.argument("model", required=False)(command)


def _lengths(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--temperature", type=DecimalFloat(), default=0.0, show_default=True, help="0 is greedy")(
        command
    )
    command = click.option("--output-len", type=IntRange(2), default=64, show_default=True, help="tokens of an output")(
        command
    )
    return click.option("--input-len", type=IntRange(1), default=128, show_default=True, help="tokens of a prompt")(
        command
    )


@bench.command(cls=GroupedCommand)
@click.option(
    "--num-prompts", type=IntRange(1), default=64, show_default=True, help="requests that arrive at the same time"
)
@_lengths
@_common
def throughput(num_prompts: int, **rest: Any) -> None:
    """Measure tokens per second with many requests at once."""
    _batches("throughput", [num_prompts], **rest)


@bench.command(cls=GroupedCommand)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=IntRange(1),
    multiple=True,
    default=(1, 8, 32),
    show_default=True,
    help="requests at the same time; may be given several times",
)
@_lengths
@_common
def latency(batch_sizes: tuple[int, ...], **rest: Any) -> None:
    """Measure the time to the first token and the time per token, for each batch size."""
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
    if options.get("node_rank"):
        node.run(model, options, online=False)
        return
    with LLM(open_model(model, options, own_process=True)) as llm:
        meter = SpeedMeter(llm.engine, llm.vocab_size, temperature=temperature)
        results = []
        for batch_size in batch_sizes:
            shape = BatchShape(batch_size, input_len, output_len)
            meter.run(BatchShape(batch_size, input_len, 2))  # the first run of a size takes longer
            before = llm.stats()
            runs = [meter.run(shape) for _ in range(repeat)]
            results.append({"batch_size": batch_size, **medians(runs), **_communication(llm, before)})
        stats = llm.stats()
    report = {
        "benchmark": name,
        "model": model or hub.BUNDLED_NAME,
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
    write_report(report, output)


def _communication(llm: LLM, before: EngineStats) -> dict[str, Any]:
    """Return what communication has cost since earlier stats, if the user wants to know."""
    if not llm.options.parallel.profile_comm:
        return {}
    return {"communication": profile_replicas(replicas_of(llm.stats()), replicas_of(before)).as_json()}


@bench.command(cls=GroupedCommand)
@click.option("--probe", is_flag=True, hidden=True)
@_common
def startup(model: str | None, repeat: int, output: Path | None, probe: bool, **flags: Any) -> None:
    """Measure the seconds from the start of the command until it can take requests, phase by phase."""
    if probe:
        with LLM(open_model(model, engine_values(flags), own_process=True)) as llm:
            print(_READY + json.dumps(dict(llm.stats().start_s)), flush=True)
        return
    runs = [_start_once() for _ in range(repeat)]
    phases = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    write_report(
        {"benchmark": "startup", "model": model or hub.BUNDLED_NAME, "repeat": repeat, "seconds": phases}, output
    )


def _start_once() -> dict[str, float]:
    """Run this command once more in its own process, and return the seconds of each phase."""
    command = [*import_path.python_command("shoal"), *sys.argv[1:], "--probe"]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env.child_environment({})) as process:
        if process.stdout is None:
            raise EngineError("the probe has no output")
        for line in process.stdout:
            if line.startswith(_READY):
                ready = time.monotonic() - begun
                return {"ready": ready, **json.loads(line.removeprefix(_READY))}
    command_line = " ".join(["shoal", *sys.argv[1:], "--probe"])
    raise EngineError(f"{command_line} ended with code {process.returncode} before it was ready")
