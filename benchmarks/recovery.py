"""Measure how long streams pause when a worker is killed: `python benchmarks/recovery.py [-tp 2]` prints JSON.

The server has the bundled model, and one replica unless options say otherwise. In each round one of its workers is
killed while 32 streams run. The report has the longest time between two chunks of any stream.
"""

import asyncio
import json
import random
import statistics
from typing import Any

import click

from disturbed_streams import longest_pause, settle
from running_server import start_server

_STREAMS = 32
_TOKENS = 400


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--rounds", default=5, show_default=True)
@click.argument("rest", nargs=-1)
def main(rounds: int, rest: tuple[str, ...]) -> None:
    """Measure rounds of kills. REST are options of the server."""
    found, pick = [], random.Random(0)

    def victim(status: Any) -> int:
        return int(pick.choice(pick.choice(status["replicas"])["stats"]["ranks"])["pid"])

    with start_server(None, *(rest or ("-tp", "2"))) as server:
        for _ in range(rounds):
            settle(server.url)
            found.append(asyncio.run(longest_pause(server.url, _STREAMS, _TOKENS, victim)))
    print(json.dumps({"longest_pause_s": found, "median_s": statistics.median(found), "worst_s": max(found)}, indent=2))


if __name__ == "__main__":
    main()
