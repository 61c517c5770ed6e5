"""Compare decode rate and memory with `transformers.generate`, on random weights with the sizes of Qwen3-0.6B.

`python benchmarks/versus_transformers.py [--folder FOLDER]` prints JSON. Each side runs in a separate process with
threads bound to cores, in turn, `--rounds` times. Ratios are computed round by round, and figures are medians.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from checkpoint import make

_SHAPE = "shape:qwen3-0.6b"


def _run(command: list[str], pinned: bool) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    environment = dict(os.environ)
    if pinned:
        environment |= {"GOMP_CPU_AFFINITY": " ".join(map(str, cores)), "OMP_NUM_THREADS": str(len(cores))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _shoal(folder: Path, batches: list[int], input_len: int, output_len: int, *extra: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "shoal", "bench", "latency", str(folder), "--repeat", "2", *extra]
    command += ["--input-len", str(input_len), "--output-len", str(output_len)]
    for batch in batches:
        command += ["--batch-size", str(batch)]
    return _run(command, pinned=False)  # it pins itself


def _transformers(folder: Path, batches: list[int], input_len: int, output_len: int) -> dict[str, Any]:
    arguments = [str(folder), str(input_len), str(output_len), *map(str, batches)]
    return _run([sys.executable, __file__, "--transformers", *arguments], pinned=True)


def _measure_transformers(arguments: list[str]) -> None:
    """Measure `transformers.generate`, in a separate process. The decode rate is that of the tokens after the first."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, input_len, output_len, *batches = arguments
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    vocab = model.config.vocab_size

    def seconds(batch: int, new_tokens: int) -> float:
        prompts = torch.randint(0, vocab, (batch, int(input_len)))
        begun = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=0,
        )
        return time.perf_counter() - begun

    results = []
    seconds(1, 2)
    for batch in map(int, batches):
        first = statistics.median(seconds(batch, 1) for _ in range(2))
        whole = statistics.median(seconds(batch, int(output_len)) for _ in range(2))
        rate = batch * (int(output_len) - 1) / (whole - first)
        results.append(
            {"batch_size": batch, "decode_tokens_per_s": rate, "input_tokens_per_s": batch * int(input_len) / first}
        )
    print(json.dumps({"results": results}))


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="where the checkpoint is, or is to be made")
@click.option("--batch-size", "batches", type=int, multiple=True, default=(1, 8, 32))
@click.option("--input-len", type=int, default=128)
@click.option("--output-len", type=int, default=64)
@click.option("--rounds", type=int, default=3)
def main(folder: Path | None, batches: tuple[int, ...], input_len: int, output_len: int, rounds: int) -> None:
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "checkpoint"
        make(_SHAPE, folder)
        sizes = (list(batches), input_len, output_len)
        pairs = [(_shoal(folder, *sizes), _transformers(folder, *sizes)) for _ in range(rounds)]
        tp1 = _shoal(folder, [8], input_len, output_len, "--distributed-executor-backend", "mp")
        tp2 = _shoal(folder, [8], input_len, output_len, "-tp", "2")
    ours = tp1["ranks"][0]["memory_bytes"]
    print(
        json.dumps(
            {
                "decode": [_compare(pairs, i) for i in range(len(batches))],
                "memory": {
                    "tp1_bytes": ours,
                    "tp2_bytes": [rank["memory_bytes"] for rank in tp2["ranks"]],
                    "tp2_over_tp1": max(rank["memory_bytes"] for rank in tp2["ranks"]) / ours,
                },
            },
            indent=2,
        )
    )


def _compare(pairs: list[tuple[dict[str, Any], dict[str, Any]]], i: int) -> dict[str, Any]:
    def both(name: str) -> tuple[list[float], list[float]]:
        return [p[0]["results"][i][name] for p in pairs], [p[1]["results"][i][name] for p in pairs]

    report: dict[str, Any] = {"batch_size": pairs[0][0]["results"][i]["batch_size"]}
    for name in ("decode_tokens_per_s", "input_tokens_per_s"):
        ours, theirs = both(name)
        report[name] = {
            "shoal": statistics.median(ours),
            "transformers": statistics.median(theirs),
            "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        }
    return report


if __name__ == "__main__":
    if sys.argv[1:2] == ["--transformers"]:
        _measure_transformers(sys.argv[2:])
    else:
        main()
