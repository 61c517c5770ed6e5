"""Compare the pause of streams after the end of a rank with that after a full restart.

`python benchmarks/rank_replacement.py` prints JSON.

A replica with two tensor-parallel ranks serves, and keeps a warm spare. In each round a rank is killed, which is
replaced alone by the spare, and then the engine, which is started again with both ranks. The report has the longest
time between two chunks of any stream, for the bundled model and for made-up weights with the sizes of Qwen3-0.6B
(1.2 GB).
"""

import asyncio
import json
import statistics
import time
from typing import Any

import click

from disturbed_streams import longest_pause, settle, status
from running_server import start_server

_SPARE_S = 10.0  # for the start of the spare, which loads with a low priority
_SERVER = ("-tp", "2", "--max-restarts", "1000")
_LARGE = ("--load-format", "dummy", "--max-model-len", "2048", "--kv-cache-memory-bytes", "256MiB")


def _a_rank(found: Any) -> int:
    return int(found["replicas"][0]["stats"]["ranks"][1]["pid"])


def _the_engine(found: Any) -> int:
    return int(found["replicas"][0]["pid"])


def _measure(model: str | None, flags: tuple[str, ...], rounds: int, streams: int, tokens: int) -> dict[str, Any]:
    alone: list[float] = []
    full: list[float] = []
    with start_server(model, *_SERVER, *flags) as server:
        for _ in range(rounds):
            for victim, pauses in ((_a_rank, alone), (_the_engine, full)):
                settle(server.url)
                time.sleep(_SPARE_S)
                pauses.append(asyncio.run(longest_pause(server.url, streams, tokens, victim)))
        settle(server.url)
        stats = status(server.url)["replicas"][0]["stats"]
    medians = statistics.median(alone), statistics.median(full)
    return {
        "rank_replaced_alone_s": alone,
        "full_restart_s": full,
        "median_alone_s": medians[0],
        "median_full_s": medians[1],
        "share_of_full_restart": medians[0] / medians[1],
        "rank_replacements": stats["rank_replacements"],
    }


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--only", type=click.Choice(["bundled", "large"]), help="measure one of the two models")
def main(rounds: int, only: str | None) -> None:
    report = {}
    if only != "large":
        report["bundled"] = _measure(None, (), rounds, 32, 400)
    if only != "bundled":
        report["qwen3-0.6b"] = _measure("shape:qwen3-0.6b", _LARGE, rounds, 4, 40)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
