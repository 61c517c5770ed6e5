"""The engines that `benchmarks/compare.py` runs: each started with a checkpoint, and asked for the times of cases."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import click

from peers import environments

OWN = ("shoal", "shoal tp 2", "shoal ep 2")
PEERS = ("vllm", "vllm tp 2", "vllm ep 2", "llama.cpp", "transformers")
_HERE = Path(__file__).parent
_END_S = 60.0
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Requests:
    """Prompts of equal length, and the number of tokens that are drawn after each."""

    batch: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Settings:
    """What an engine is started with."""

    quantization: str | None  # as in Shoal
    max_model_len: int
    max_num_seqs: int
    kv_gib: int
    temperature: float


class Engine(Protocol):
    def times(self, requests: Requests) -> dict[str, float]:
        """Return `prompt_s`, the seconds until each prompt has a token, and `decode_s`, those of all other tokens."""


@contextmanager
def start(name: str, folder: Path, home: Path, settings: Settings) -> Iterator[Engine]:
    """Give an engine that is ready. Its environment is made in `home` if it is not there."""
    cores = sorted(os.sched_getaffinity(0))
    kind, _, layout = name.partition(" ")
    if settings.quantization is not None and kind not in ("shoal", "llama.cpp"):
        raise click.ClickException(f"{name} is not compared with quantized weights; choose llama.cpp")
    sizes = {"tp": 2 if layout else 1, "experts": layout == "ep 2"}
    limits = {"max_model_len": settings.max_model_len, "max_num_seqs": settings.max_num_seqs}
    others = {
        "kv_bytes": settings.kv_gib * _GIB,
        "quantization": settings.quantization,
        "temperature": settings.temperature,
    }
    given = [str(folder), json.dumps({**sizes, **limits, **others})]
    pinned = {"OMP_NUM_THREADS": str(len(cores)), "GOMP_CPU_AFFINITY": " ".join(map(str, cores))}
    if kind == "shoal":
        quiet = {"SHOAL_LOG_LEVEL": "warning", **({} if layout else pinned)}
        process = _process(name, [sys.executable, str(_HERE / "shoal_peer.py"), *given], quiet)
    elif kind == "transformers":
        process = _process(name, [sys.executable, str(_HERE / "transformers_peer.py"), *given], pinned)
    elif kind == "vllm":
        bound = {"VLLM_CPU_OMP_THREADS_BIND": ("|" if layout else ",").join(map(str, cores))}
        # No device is looked for, nothing is reported, and the engine needs no network.
        quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        variables = {**bound, **quiet, "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_gib)}
        process = _process(name, [str(environments.vllm(home)), str(_HERE / "vllm_peer.py"), *given], variables)
    else:
        program = environments.llama(home)
        yield _Llama(program, environments.gguf(home, folder, settings.quantization), len(cores))
        return
    with process as engine:
        yield engine


class _Process:
    """An engine that loads the model once, and answers requests (`requests_of_peers.py`).

    It is stopped while others have their turn: some engines use the processor even if they have nothing to do.
    """

    def __init__(self, process: "subprocess.Popen[str]", name: str) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._to: IO[str] = process.stdin
        self._from: IO[str] = process.stdout
        self._name = name
        self._group = process.pid
        self._read()
        os.killpg(self._group, signal.SIGSTOP)

    def times(self, requests: Requests) -> dict[str, float]:
        sizes = {"batch": requests.batch, "input_len": requests.input_len, "output_len": requests.output_len}
        os.killpg(self._group, signal.SIGCONT)
        print(json.dumps(sizes), file=self._to, flush=True)
        found = self._read()
        os.killpg(self._group, signal.SIGSTOP)
        return found

    def _read(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line:
            raise click.ClickException(f"{self._name} ended; its output above says why")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def _process(name: str, command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Engine]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,  # an engine may have processes of its own, which end with it
    )
    try:
        yield _Process(process, name)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
        if process.stdin is not None:
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class _Llama:
    """llama.cpp's own benchmark of batches, which loads the model for each case (in a second)."""

    def __init__(self, program: Path, model: Path, cores: int) -> None:
        self._program = program
        self._model = model
        self._cores = cores

    def times(self, requests: Requests) -> dict[str, float]:
        drawn = max(requests.output_len, 2)
        context = requests.batch * (requests.input_len + drawn)
        sizes = ["-npp", str(requests.input_len), "-ntg", str(drawn), "-npl", str(requests.batch)]
        limits = ["-c", str(context), "-b", "2048", "-ub", "512", "-t", str(self._cores), "-tb", str(self._cores)]
        command = [str(self._program), "-m", str(self._model), *limits, *sizes, "--output-format", "jsonl"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
        found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
        # Its time of drawing is that of as many steps as there are tokens; ours leaves out the first token.
        return {"prompt_s": found["t_pp"], "decode_s": found["t_tg"] * (requests.output_len - 1) / drawn}
