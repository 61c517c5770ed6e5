"""Compare Shoal with other engines on this machine, on random weights with the sizes of real models.

`python benchmarks/compare.py [--suite NAME]` prints JSON, and figures on stderr as they come. A suite is a model, a
format of its weights, and cases that are measured with it. Each engine runs in a process of its own, and vLLM and
llama.cpp in environments of their own, which are made in `--peers` at first (minutes, and gigabytes). All have the same
cores. They take turns: in each round every engine computes every case, while the others wait. Figures are medians of
tokens per second over the rounds; ratios to the best peer are computed round by round.
"""

import json
import signal
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from checkpoint import make
from peers import engines
from peers.engines import Engine, Requests, Settings


@dataclass(frozen=True, slots=True)
class Case:
    """Requests whose speed is compared: that of the prompts, or of the tokens after the first."""

    name: str
    requests: Requests
    goal: float  # the wanted ratio to the best peer

    def rate(self, times: Mapping[str, float]) -> float:
        """Return the tokens per second."""
        sizes = self.requests
        if sizes.output_len == 1:
            return sizes.batch * sizes.input_len / times["prompt_s"]
        return sizes.batch * (sizes.output_len - 1) / times["decode_s"]


@dataclass(frozen=True, slots=True)
class Suite:
    """A model, a format of its weights, the engines that run it unless others are named, and the cases."""

    shape: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    own: tuple[str, ...] = ("shoal",)
    quantization: str | None = None
    kv_gib: int = 5  # for 8 sequences of 4,096 tokens and more
    # 0: greedy. A mixture needs tokens that are drawn at random: greedy ones of random weights soon repeat, so that a
    # router sends all of them to the same experts, and the last bits of an engine decide how many it has to read.
    temperature: float = 0.0

    def settings(self, cases: Sequence[Case]) -> Settings:
        longest = max(case.requests.input_len + case.requests.output_len for case in cases)
        batch = max(case.requests.batch for case in cases)
        return Settings(self.quantization, max(longest, 512), batch, self.kv_gib, self.temperature)


def _decode(batch: int, goal: float, *, behind: int = 128, tokens: int = 64) -> Case:
    where = "" if behind == 128 else f" behind {behind}"
    return Case(f"decode, batch {batch}{where}", Requests(batch, behind, tokens), goal)


def _prompts(batch: int, length: int, goal: float) -> Case:
    return Case(f"prompts, {batch} x {length}", Requests(batch, length, 1), goal)


_SMALL = (_decode(1, 4.0, tokens=256), _decode(32, 3.0, tokens=256))
SUITES = {
    "dense": Suite(
        "shape:qwen3-0.6b",
        (
            _decode(1, 1.0),
            _decode(8, 1.5),
            _decode(32, 1.5),
            _prompts(8, 128, 1.1),
            _prompts(1, 2048, 1.1),
            _prompts(1, 6144, 1.1),
            _decode(8, 1.2, behind=4096, tokens=33),
        ),
        ("vllm", "llama.cpp", "transformers"),
    ),
    "int8": Suite(
        "shape:qwen3-0.6b",
        (_decode(1, 1.0), _decode(32, 2.5), _prompts(8, 128, 2.5)),
        ("llama.cpp",),
        quantization="int8",
    ),
    "int4": Suite(
        "shape:qwen3-0.6b",
        (_decode(1, 1.0), _decode(32, 1.0), _prompts(8, 128, 1.0)),
        ("llama.cpp",),
        quantization="int4",
    ),
    "mixture": Suite(
        "shape:qwen3-moe-1.3b",
        (_decode(1, 1.2), _decode(8, 1.2), _decode(32, 1.2), _prompts(8, 128, 1.2)),
        ("vllm",),
        own=("shoal", "shoal tp 2", "shoal ep 2"),
        kv_gib=2,
        temperature=1.0,
    ),
    "10m": Suite("shape:llama-10m", _SMALL, ("vllm",), kv_gib=1),
    "20m": Suite("shape:llama-20m", _SMALL, ("vllm",), kv_gib=1),
}
_CASES = sorted({case.name for suite in SUITES.values() for case in suite.cases})


def _end(*_: object) -> None:
    raise KeyboardInterrupt


@click.command()
@click.option("--suite", "suites", type=click.Choice(list(SUITES)), multiple=True, default=tuple(SUITES))
@click.option("--own", type=click.Choice(engines.OWN), multiple=True, help="these layouts of Shoal")
@click.option("--peer", "peers", type=click.Choice(engines.PEERS), multiple=True, help="these other engines")
@click.option("--case", "names", type=click.Choice(_CASES), multiple=True, help="only these")
@click.option("--folder", type=click.Path(path_type=Path), help="where checkpoints are, or are to be made")
@click.option("--peers", "home", type=click.Path(path_type=Path), default=Path.home() / ".cache/shoal/peers")
@click.option("--rounds", default=3, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="write bars to this file (.svg or .png)")
def main(
    suites: tuple[str, ...],
    own: tuple[str, ...],
    peers: tuple[str, ...],
    names: tuple[str, ...],
    folder: Path | None,
    home: Path,
    rounds: int,
    plot: Path | None,
) -> None:
    signal.signal(signal.SIGTERM, _end)  # so that the engines end, too
    report = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in suites:
            suite = SUITES[name]
            cases = [case for case in suite.cases if not names or case.name in names]
            if not cases:
                continue
            model = make(suite.shape, (folder or Path(temporary)) / suite.shape.removeprefix("shape:"))
            ours, others = own or suite.own, peers or suite.peers
            with ExitStack() as stack:
                settings = suite.settings(cases)
                started = ((each, engines.start(each, model, home, settings)) for each in (*ours, *others))
                running = {each: stack.enter_context(engine) for each, engine in started}
                rates = _measure(name, cases, running, rounds)
            report += [_row(name, case, rates[case.name], ours[0], others) for case in cases]
    print(json.dumps(report, indent=2))
    if plot is not None:
        _plot(report, plot)


def _measure(
    suite: str, cases: Sequence[Case], running: Mapping[str, Engine], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Return the tokens per second of each round, by case and engine."""
    rates: dict[str, dict[str, list[float]]] = {case.name: {name: [] for name in running} for case in cases}
    for number in range(rounds):
        for case in cases:
            for name, engine in running.items():
                rates[case.name][name].append(case.rate(engine.times(case.requests)))
            shown = {name: round(each[-1], 1) for name, each in rates[case.name].items()}
            click.echo(f"{suite}, round {number}, {case.name}: {shown}", err=True)
    return rates


def _row(
    suite: str, case: Case, rates: Mapping[str, Sequence[float]], own: str, peers: Sequence[str]
) -> dict[str, Any]:
    ratios = [mine / max(rates[peer][i] for peer in peers) for i, mine in enumerate(rates[own])]
    return {
        "suite": suite,
        "case": case.name,
        "tokens_per_s": {name: round(statistics.median(each), 1) for name, each in rates.items()},
        "all": {name: [round(rate, 1) for rate in each] for name, each in rates.items()},
        "ratio_to_best_peer": round(statistics.median(ratios), 2),
        "goal": case.goal,
    }


def _plot(report: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the rates of each case, as multiples of Shoal's."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in report for name in row["tokens_per_s"]))
    figure = Figure(figsize=(max(10.0, 0.7 * len(report)), 5), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        measured = [(number, row["tokens_per_s"]) for number, row in enumerate(report) if name in row["tokens_per_s"]]
        shares = [rates[name] / next(iter(rates.values())) for _, rates in measured]
        at = [number + (place - (len(names) - 1) / 2) * 0.8 / len(names) for number, _ in measured]
        axes.bar(at, shares, 0.8 / len(names), label=name)
    labels = [f"{row['suite']}: {row['case']}" for row in report]
    axes.set_xticks(range(len(report)), labels, rotation=30, ha="right")
    axes.set_ylabel("tokens per second, the first of Shoal's = 1")
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
