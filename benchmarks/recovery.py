"""Measure how long streams pause when a worker is killed: `python benchmarks/recovery.py [-tp 2]` prints JSON.

The server has the bundled model, and one replica unless options say otherwise. In each round one of its workers is
killed while 32 streams run. The report has the longest time between two chunks of any stream.

With --hang the worker is not killed but computes for ever in the middle of a step. The report has the seconds from then
until /health answers 503, and until the streams go on.
"""

import asyncio
import json
import random
import statistics
from typing import Any

import click

from disturbed_streams import HANGS_ON_SIGNAL, hang, longest_pause, settle
from running_server import start_server

_STREAMS = 32
_TOKENS = 400


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--rounds", default=5, show_default=True)
@click.option("--hang", "hangs", is_flag=True, help="have the worker hang in a step, instead of killing it")
@click.argument("rest", nargs=-1)
def main(rounds: int, rest: tuple[str, ...], *, hangs: bool) -> None:
    """Measure rounds of kills or hangs. REST are options of the server."""
    found: dict[str, list[float]] = {}
    pick = random.Random(0)

    def victim(status: Any) -> int:
        return int(pick.choice(pick.choice(status["replicas"])["stats"]["ranks"])["pid"])

    with start_server(None, *(rest or ("-tp", "2")), environment=HANGS_ON_SIGNAL if hangs else {}) as server:
        for _ in range(rounds):
            settle(server.url)
            if hangs:
                figures = asyncio.run(hang(server.url, _STREAMS, _TOKENS, victim))
                round_ = dict(zip(("until_503_s", "until_streams_go_on_s"), figures, strict=True))
            else:
                round_ = {"longest_pause_s": asyncio.run(longest_pause(server.url, _STREAMS, _TOKENS, victim))}
            for name, seconds in round_.items():
                found.setdefault(name, []).append(seconds)
    report = {
        name: {"rounds": all_, "median": statistics.median(all_), "worst": max(all_)} for name, all_ in found.items()
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
