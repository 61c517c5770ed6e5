"""Compare ways to run ranks over hosts: by Ray and by hand, on one host and on two, over a fast and a slow link.

`PYTHONPATH=tests python benchmarks/hosts.py` prints JSON. It needs two cores, the right to make network namespaces
(root), and Ray. The two hosts are namespaces of this machine, and each has one core. Variants run one after the other,
`--rounds` times; figures are medians, and ratios are computed round by round.

- `executors`: ranks of `--model` as processes of this host, and the same in a Ray cluster of this host.
- `links`: two stages and two tensor-parallel ranks over two hosts, with a link that is not limited and with one of
  `--mbits`.
- `plans`: the control of a step of the bundled model with two stages, on one host and on two; both use gloo.
- `start`: seconds from the command until the engine is ready, over two hosts.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click

from support.hosts import Host, limit_rate, two_hosts
from support.ray_cluster import ENVIRONMENT, RayNode, ray_cluster

_SHAPE = "shape:qwen3-0.6b"
_TIMEOUT_S = 900
_KEY = "a key of the benchmark"
_LAYOUTS = {"pp 2": ["-pp", "2"], "tp 2": ["-tp", "2"]}


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--model", default=_SHAPE, show_default=True, help="of the part `executors`")
@click.option("--mbits", default=100, show_default=True, help="rate of the slow link in Mbit/s")
@click.option(
    "--part", "parts", multiple=True, type=click.Choice(["executors", "links", "plans", "start"]), help="only these"
)
def main(rounds: int, batch_size: int, model: str, mbits: int, parts: tuple[str, ...]) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        raise click.UsageError("two cores are needed")
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        hosts = stack.enter_context(two_hosts())
        wanted = parts or ("executors", "links", "plans", "start")
        if "links" in wanted:
            found["links"] = _links(hosts, batch_size, rounds, mbits)
        if "plans" in wanted:
            found["plans"] = _plans(hosts, rounds)
        if "executors" in wanted:
            found["executors"] = _executors(hosts[0], batch_size, rounds, model)
        if "start" in wanted:
            cluster = stack.enter_context(ray_cluster(hosts))
            found["start"] = _starts(hosts, cluster[0].address, rounds)
    print(json.dumps(found, indent=2))


def _executors(host: Host, batch_size: int, rounds: int, model: str) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {"mp": [], "ray": []}
    output_len = 64 if model == _SHAPE else 512  # steps of small models are short
    with closing(RayNode(host, cpus=2)) as cluster:
        flags = {"mp": [], "ray": ["--ray-address", cluster.address]}
        for number in range(rounds):
            for name, found in runs.items():
                executor = ["-tp", "2", "--distributed-executor-backend", name, *flags[name]]
                found.append(_bench([host], batch_size, executor, {0: []}, model, output_len))
                click.echo(f"round {number}, {name}: {found[-1]}", err=True)
    return _compared(runs, "ray", "mp")


def _links(hosts: Sequence[Host], batch_size: int, rounds: int, mbits: int) -> dict[str, Any]:
    found = {}
    for layout, flags in _LAYOUTS.items():
        runs: dict[str, list[dict[str, Any]]] = {"slow link": [], "fast link": []}
        for number in range(rounds):
            for name, each in runs.items():
                for host in hosts:
                    limit_rate(host, mbits if name == "slow link" else None)
                each.append(_bench(hosts, batch_size, flags, {0: ["--cpu-cores", "0"], 1: ["--cpu-cores", "1"]}))
                click.echo(f"round {number}, {layout}, {name}: {each[-1]}", err=True)
        found[layout] = _compared(runs, "slow link", "fast link")
    for host in hosts:
        limit_rate(host, None)
    return found


def _plans(hosts: Sequence[Host], rounds: int) -> dict[str, Any]:
    one = ["-pp", "2", "--comm-backend", "gloo", "--cpu-cores", "0|1"]
    here, there = {0: ["--cpu-cores", "0"]}, {1: ["--cpu-cores", "1"]}
    steps: dict[str, list[float]] = {"two hosts": [], "one host": []}  # in microseconds
    for number in range(rounds):
        runs = {
            "one host": _bench(hosts[:1], 1, one, {0: []}, "bundled", 800),
            "two hosts": _bench(hosts, 1, one[:2], {**here, **there}, "bundled", 800),
        }
        for name, run in runs.items():
            steps[name].append(1e6 * run["time_per_output_token_s"] - run["forward_us_per_step"])
        click.echo(f"round {number}: {steps}", err=True)
    more = [two - one for two, one in zip(steps["two hosts"], steps["one host"], strict=True)]
    found = {name: round(statistics.median(each)) for name, each in steps.items()}
    return {"us_per_step_beside_the_ranks_work": found, "more_us_over_two_hosts": round(statistics.median(more))}


def _starts(hosts: Sequence[Host], address: str, rounds: int) -> dict[str, Any]:
    by_ray = ["-tp", "2", "--placement", "tp-across", "--distributed-executor-backend", "ray", "--ray-address", address]
    seconds: dict[str, list[float]] = {"by hand": [], "ray": []}
    for _ in range(rounds):
        seconds["by hand"].append(_start(hosts, ["-tp", "2"]))
        seconds["ray"].append(_start(hosts[:1], by_ray))
    return {name: round(statistics.median(each), 1) for name, each in seconds.items()}


def _start(hosts: Sequence[Host], flags: Sequence[str]) -> float:
    """Return how long `shoal generate` takes for one token of the bundled model, over these hosts."""
    begun = time.monotonic()
    _run(hosts, ["generate", "bundled", "-p", "a", "--max-tokens", "1", *flags], {number: [] for number in (0, 1)})
    return time.monotonic() - begun


def _bench(
    hosts: Sequence[Host],
    batch_size: int,
    flags: Sequence[str],
    local: Mapping[int, Sequence[str]],
    model: str = _SHAPE,
    output_len: int = 64,
) -> dict[str, Any]:
    """Run `shoal bench latency` over these hosts, and return its figures for the batch size."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        sizes = [
            "--batch-size",
            str(batch_size),
            "--input-len",
            "128",
            "--output-len",
            str(output_len),
            "--repeat",
            "1",
        ]
        memory = ["--kv-cache-memory-bytes", "1GiB"]
        _run(hosts, ["bench", "latency", model, *sizes, *memory, "--output", str(output), *flags], local)
        (found,) = json.loads(output.read_text())["results"]
        return dict(found)


def _run(hosts: Sequence[Host], command: Sequence[str], local: Mapping[int, Sequence[str]]) -> None:
    """Run a command on each host, with the flags of nodes if there are several."""
    environment = {**os.environ, **ENVIRONMENT, "SHOAL_CLUSTER_KEY": _KEY, "SHOAL_LOG_LEVEL": "warning"}
    programs = []
    for number, host in reversed(list(enumerate(hosts))):
        nodes = ["--nnodes", str(len(hosts)), "--node-rank", str(number), "--master-addr", hosts[0].address]
        flags = [*(nodes if len(hosts) > 1 else ()), *local[number]]
        programs.append(
            subprocess.Popen(
                [*host.inside, sys.executable, "-m", "shoal", *command, *flags], env=environment, stdout=sys.stderr
            )
        )
    try:
        for program in programs:
            if program.wait(_TIMEOUT_S):
                raise click.ClickException(f"{program.args!r} ended with exit code {program.returncode}")
    finally:
        for program in programs:
            program.kill()


def _compared(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str, base: str) -> dict[str, Any]:
    def median(which: str, figure: str) -> float | None:
        values = [run[figure] for run in runs[which] if run[figure] is not None]
        return round(statistics.median(values), 1) if values else None

    figures = ("output_tokens_per_s", "control_us_per_step", "forward_us_per_step")
    ratios = [
        one["output_tokens_per_s"] / other["output_tokens_per_s"]
        for one, other in zip(runs[name], runs[base], strict=True)
    ]
    return {
        **{which: {figure: median(which, figure) for figure in figures} for which in runs},
        "ratio": round(statistics.median(ratios), 3),
    }


if __name__ == "__main__":
    main()
