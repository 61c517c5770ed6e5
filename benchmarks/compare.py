"""Compare Shoal with other engines on this machine, on random weights with the sizes of Qwen3-0.6B in bfloat16.

`python benchmarks/compare.py --peer vllm --peer llama.cpp --peer transformers` prints JSON, and a table on stderr. Each
peer runs in a process of its own, and vLLM and llama.cpp in environments of their own, which are made in `--peers` at
first (minutes, and gigabytes). All have the same cores. They take turns: in each round every peer computes every case,
while the others wait. Figures are medians of tokens per second over the rounds; ratios to the best peer are computed
round by round.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import click

from checkpoint import make
from peers import environments

_SHAPE = "shape:qwen3-0.6b"
_HERE = Path(__file__).parent / "peers"
_END_S = 60.0


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts of equal length, and the tokens that are drawn after each."""

    name: str
    batch: int
    input_len: int
    output_len: int
    goal: float  # the wanted ratio to the best peer

    def rate(self, times: Mapping[str, float]) -> float:
        """Return the tokens per second: of the prompts, or of the tokens after the first."""
        if self.output_len == 1:
            return self.batch * self.input_len / times["first_s"]
        return self.batch * (self.output_len - 1) / (times["whole_s"] - times["first_s"])


CASES = [
    Case("decode, batch 1", 1, 128, 64, 1.0),
    Case("decode, batch 8", 8, 128, 64, 1.5),
    Case("decode, batch 32", 32, 128, 64, 1.5),
    Case("prompts, 8 x 128", 8, 128, 1, 1.1),
    Case("prompt, 1 x 2048", 1, 2048, 1, 1.1),
    Case("prompt, 1 x 6144", 1, 6144, 1, 1.1),
    Case("decode, batch 8 behind 4096", 8, 4096, 17, 1.2),
]


class Peer(Protocol):
    def times(self, case: Case) -> dict[str, float]:
        """Return the seconds of the first token and of all tokens of a case."""


class _ProcessPeer:
    """A peer that loads the model once, and answers cases (`peers/requests_of_peers.py`)."""

    def __init__(self, process: "subprocess.Popen[str]", name: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._to: IO[str] = process.stdin
        self._from: IO[str] = process.stdout
        self._name = name
        self._read()

    def times(self, case: Case) -> dict[str, float]:
        sizes = {"batch": case.batch, "input_len": case.input_len, "output_len": case.output_len}
        print(json.dumps(sizes), file=self._to, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            raise click.ClickException(f"{self._name} ended; its output above says why")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def _process(name: str, command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Peer]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,  # a peer may have processes of its own, which end with it
    )
    try:
        yield _ProcessPeer(process, name)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _LlamaPeer:
    """llama.cpp's own benchmark of batches, which loads the model for each case (in a second)."""

    def __init__(self, program: Path, model: Path) -> None:
        self._program = program
        self._model = model

    def times(self, case: Case) -> dict[str, float]:
        sizes = ["-npp", str(case.input_len), "-ntg", str(max(case.output_len, 2)), "-npl", str(case.batch)]
        context = case.batch * (case.input_len + max(case.output_len, 2))
        limits = ["-c", str(context), "-b", "2048", "-ub", "512", "-t", str(_cores()), "-tb", str(_cores())]
        command = [str(self._program), "-m", str(self._model), *limits, *sizes, "--output-format", "jsonl"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        # Its time of drawing is that of as many steps as there are tokens; ours leaves out the first token.
        drawn = found["t_tg"] * (case.output_len - 1) / max(case.output_len, 2)
        return {"first_s": found["t_pp"], "whole_s": found["t_pp"] + drawn}


@contextmanager
def _peer(name: str, folder: Path, home: Path) -> Iterator[Peer]:
    """Return a peer that is ready. Its environment is made if it is not there."""
    cores = sorted(os.sched_getaffinity(0))
    pinned = {"OMP_NUM_THREADS": str(len(cores)), "GOMP_CPU_AFFINITY": " ".join(map(str, cores))}
    if name.startswith("shoal"):
        tp = "2" if name == "shoal tp 2" else "1"
        environment = {"SHOAL_LOG_LEVEL": "warning", **(pinned if tp == "1" else {})}
        with _process(name, [sys.executable, str(_HERE / "shoal_peer.py"), str(folder), tp], environment) as peer:
            yield peer
    elif name == "transformers":
        command = [sys.executable, str(_HERE / "transformers_peer.py"), str(folder)]
        with _process(name, command, pinned) as peer:
            yield peer
    elif name.startswith("vllm"):
        tp = "2" if name == "vllm tp 2" else "1"
        each = [str(core) for core in cores]
        bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(each) if tp == "2" else ",".join(each)}
        # No device is looked for, nothing is reported, and the engine needs no network.
        quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        command = [str(environments.vllm(home)), str(_HERE / "vllm_peer.py"), str(folder), tp]
        with _process(name, command, {**bound, **quiet, "VLLM_CPU_KVCACHE_SPACE": "5"}) as peer:
            yield peer
    else:
        program = environments.llama(home)
        yield _LlamaPeer(program, environments.gguf(home, folder))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _end(*_: object) -> None:
    raise KeyboardInterrupt


@click.command()
@click.option(
    "--peer",
    "peers",
    type=click.Choice(["vllm", "vllm tp 2", "llama.cpp", "transformers"]),
    multiple=True,
    default=("vllm", "llama.cpp", "transformers"),
    show_default=True,
)
@click.option("--own", "own", type=click.Choice(["shoal", "shoal tp 2"]), multiple=True, default=("shoal",))
@click.option("--folder", type=click.Path(path_type=Path), help="where the checkpoint is, or is to be made")
@click.option("--peers", "home", type=click.Path(path_type=Path), default=Path.home() / ".cache/shoal/peers")
@click.option("--case", "names", type=click.Choice([case.name for case in CASES]), multiple=True, help="only these")
@click.option("--rounds", default=3, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="write bars to this file (.svg or .png)")
def main(
    peers: tuple[str, ...],
    own: tuple[str, ...],
    folder: Path | None,
    home: Path,
    names: tuple[str, ...],
    rounds: int,
    plot: Path | None,
) -> None:
    signal.signal(signal.SIGTERM, _end)  # so that the peers end, too
    cases = [case for case in CASES if not names or case.name in names]
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint"
        make(_SHAPE, folder)
        running = {name: stack.enter_context(_peer(name, folder, home)) for name in (*own, *peers)}
        rates: dict[str, dict[str, list[float]]] = {case.name: {name: [] for name in running} for case in cases}
        for number in range(rounds):
            for case in cases:
                for name, peer in running.items():
                    rates[case.name][name].append(case.rate(peer.times(case)))
                shown = {name: round(each[-1], 1) for name, each in rates[case.name].items()}
                click.echo(f"round {number}, {case.name}: {shown}", err=True)
    report = [_row(case, rates[case.name], own[0], peers) for case in cases]
    print(json.dumps(report, indent=2))
    if plot is not None:
        _plot(report, plot)


def _row(case: Case, rates: Mapping[str, Sequence[float]], own: str, peers: Sequence[str]) -> dict[str, Any]:
    ratios = [mine / max(rates[peer][i] for peer in peers) for i, mine in enumerate(rates[own])] if peers else []
    return {
        "case": case.name,
        "tokens_per_s": {name: round(statistics.median(each), 1) for name, each in rates.items()},
        "all": {name: [round(rate, 1) for rate in each] for name, each in rates.items()},
        "ratio_to_best_peer": round(statistics.median(ratios), 2) if ratios else None,
        "goal": case.goal,
    }


def _plot(report: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw the rates of each case, as multiples of Shoal's."""
    from matplotlib.figure import Figure

    names = list(report[0]["tokens_per_s"])
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        shares = [row["tokens_per_s"][name] / row["tokens_per_s"][names[0]] for row in report]
        at = [number + (place - (len(names) - 1) / 2) * 0.8 / len(names) for number in range(len(report))]
        axes.bar(at, shares, 0.8 / len(names), label=name)
    axes.set_xticks(range(len(report)), [row["case"] for row in report], rotation=20, ha="right")
    axes.set_ylabel(f"tokens per second, {names[0]} = 1")
    axes.legend()
    figure.savefig(file)


if __name__ == "__main__":
    main()
