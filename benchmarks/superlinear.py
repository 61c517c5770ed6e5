"""Show that two devices can be more than twice as fast as one, since their KV cache is much larger.

`python benchmarks/superlinear.py [--checkpoint FOLDER] [--plot docs/superlinear.svg]` prints JSON. A device is one core
with a memory budget that leaves little room for the KV cache beside all weights. Each of two such devices has half of
the weights, and uses the freed memory for KV cache: there are many times as many blocks, and batches are larger by the
same factor. Throughput grows with the batch as well as with the cores.
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
from shoal.launch.open_model import open_model
from shoal.values import format_bytes

_SHAPE = "shape:qwen3-0.6b"
_LAYOUTS = {"tp 1, pp 1": (1, 1), "tp 2, pp 1": (2, 1), "tp 1, pp 2": (1, 2), "tp 2, pp 2": (2, 2)}


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="made if it is not there; else a temporary one")
@click.option("--requests", default=64, show_default=True, help="that arrive together")
@click.option("--fit", default=4, show_default=True, help="of which so many fit into the KV cache of one device")
@click.option("--input-len", default=128, show_default=True)
@click.option("--output-len", default=64, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="draws the figures there")
def main(
    checkpoint: Path | None,
    requests: int,
    fit: int,
    input_len: int,
    output_len: int,
    rounds: int,
    plot: Path | None,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    shape = BatchShape(requests, input_len, output_len)
    options: dict[str, Any] = {
        "max_num_seqs": requests,
        "max_num_batched_tokens": 512,
        "max_model_len": input_len + output_len,
        "distributed_executor_backend": "mp",
    }
    with tempfile.TemporaryDirectory() as folder:
        model = make(_SHAPE, checkpoint or Path(folder))
        options["device_memory"] = memory = _memory(model, options, fit * (input_len + output_len))
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in _LAYOUTS}
        for round_ in range(rounds):
            for name, (tp, pp) in _LAYOUTS.items():
                layout = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
                runs[name].append(measure(model, cores[: tp * pp], shape, {**options, **layout}))
                rate = runs[name][-1]["output_tokens_per_s"]
                click.echo(f"round {round_}, {name}: {rate:.1f} tokens/s", err=True)
    layouts = {name: _summary(each, runs["tp 1, pp 1"]) for name, each in runs.items()}
    found = {
        "device": {"cores": 1, "memory": format_bytes(memory)},
        "cores_there_are": len(cores),
        "layouts": layouts,
    }
    print(json.dumps(found, indent=2))
    if plot is not None:
        _draw(layouts, plot)


def _memory(model: Path, options: dict[str, Any], tokens: int) -> int:
    """Return the bytes that one device needs for the whole model and the keys and values of `tokens` tokens."""
    (rank,) = open_model(str(model), options).plan.ranks
    blocks = -(-tokens // 16)
    return rank.weight_bytes + rank.activation_bytes + blocks * (rank.block_bytes + 16 * rank.context_token_bytes)


def _summary(runs: list[dict[str, Any]], single: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [run["output_tokens_per_s"] for run in runs]
    ratios = [rate / one["output_tokens_per_s"] for rate, one in zip(rates, single, strict=True)]
    return {
        "kv_blocks": runs[0]["num_blocks"],
        "kv_blocks_ratio": round(runs[0]["num_blocks"] / single[0]["num_blocks"], 1),
        "output_tokens_per_s": round(statistics.median(rates), 1),
        "throughput_ratio": round(statistics.median(ratios), 2),
        "preemptions": runs[-1]["preemptions"],
        "idle_share_by_stage": [round(share, 3) for share in runs[-1]["idle_share"]],
    }


def _draw(layouts: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "shoal"  # so that the same figures give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, key, title in zip(
        axes, ("kv_blocks", "output_tokens_per_s"), ("KV blocks", "output tokens a second"), strict=True
    ):
        values = [each[key] for each in layouts.values()]
        bars = axis.bar(list(layouts), values, color=["#8a8a8a", "#2b7bba", "#2ba26b", "#c0713c"])
        axis.bar_label(bars, [f"{value:g}\n({value / values[0]:.1f}x)" for value in values], fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.margins(y=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
