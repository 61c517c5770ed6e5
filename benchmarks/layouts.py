"""Compare layouts on two cores with one core that has the whole model.

`python benchmarks/layouts.py [--checkpoint FOLDER]` prints JSON. A rank has one core, except in layouts of four ranks,
where two ranks share a core. Layouts run one after the other, `--rounds` times. Ratios are computed round by round, and
figures are medians.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

from checkpoint import make
from isolated_engine import measure
from shoal.bench.engine_speed import BatchShape

_SHAPE = "shape:qwen3-0.6b"
_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # cores, and options
    "one core": (1, {"distributed_executor_backend": "mp"}),
    "tp 2": (2, {"tensor_parallel_size": 2}),
    "pp 2": (2, {"pipeline_parallel_size": 2}),
    "dp 2": (2, {"data_parallel_size": 2}),
    "tp 2, pp 2": (2, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),  # two ranks a core
}


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="made if it is not there; else a temporary one")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--input-len", default=128, show_default=True)
@click.option("--output-len", default=64, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--layout", "layouts", multiple=True, type=click.Choice(list(_LAYOUTS)), help="only these")
def main(
    checkpoint: Path | None, batch_size: int, input_len: int, output_len: int, rounds: int, layouts: tuple[str, ...]
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise click.UsageError("two cores are needed")
    shape = BatchShape(batch_size, input_len, output_len)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in layouts or _LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        model = make(_SHAPE, checkpoint or Path(folder))
        for round_ in range(rounds):
            for name, runs in found.items():
                count, options = _LAYOUTS[name]
                runs.append(measure(model, cores[:count], shape, {"max_num_seqs": batch_size, **options}))
                rate = runs[-1]["output_tokens_per_s"]
                click.echo(f"round {round_}, {name}: {rate:.1f} tokens/s", err=True)
    print(json.dumps({name: _summary(runs, found.get("one core", runs)) for name, runs in found.items()}, indent=2))


def _summary(runs: list[dict[str, Any]], single: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [run["output_tokens_per_s"] / one["output_tokens_per_s"] for run, one in zip(runs, single, strict=True)]
    stages = range(len(runs[0]["idle_share"]))
    return {
        "output_tokens_per_s": round(statistics.median(run["output_tokens_per_s"] for run in runs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "idle_share_by_stage": [round(statistics.median(run["idle_share"][i] for run in runs), 3) for i in stages],
        "time_to_first_token_s": round(statistics.median(run["time_to_first_token_s"] for run in runs), 2),
        "weight_mib_by_rank": [round(size / 2**20) for size in runs[0]["weight_bytes"]],
        "memory_mib_by_rank": [round(size / 2**20) for size in runs[0]["memory_bytes"]],
        "most_memory_ratio": round(max(runs[0]["memory_bytes"]) / max(single[0]["memory_bytes"]), 3),
    }


if __name__ == "__main__":
    main()
