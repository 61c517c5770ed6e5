"""Compare the router with other ways of routing, before simulated replicas.

`PYTHONPATH=tests python benchmarks/router.py` prints JSON. `load` is a share of what the replicas can do without cached
prompts. For each way of routing the report has: the microseconds of a decision (with taking the request in) and of the
bookkeeping (for all tokens of a request and its end); the tokens of the busiest replica relative to the mean; the
prompt tokens from caches as a share of those with pure affinity; and the seconds to the first token.
"""

import json
from collections.abc import Callable
from typing import Any

import click
import numpy as np

from shoal.cluster.routing.router import RequestRouter
from support.simulated_replicas import Affinity, LeastLoaded, Outcome, Policy, RoundRobin, Traffic, simulate


def _told(outcome: Outcome, requests: int, affinity_hits: int) -> dict[str, Any]:
    decisions, first_token = np.array(outcome.decision_ns) / 1e3, np.array(outcome.first_token_s)
    return {
        "decision_p50_us": round(float(np.percentile(decisions, 50)), 1),
        "decision_p99_us": round(float(np.percentile(decisions, 99)), 1),
        "books_us": round(outcome.book_ns / 1e3 / requests, 1),
        "busiest_over_mean": round(outcome.busiest, 3),
        "hits_of_affinity": round(outcome.hits / affinity_hits, 3),
        "first_token_mean_s": round(float(first_token.mean()), 3),
        "first_token_p99_s": round(float(np.percentile(first_token, 99)), 3),
        "seconds": round(outcome.seconds, 1),
    }


@click.command()
@click.option("--replicas", default=1000, show_default=True)
@click.option("--requests", default=100_000, show_default=True)
@click.option("--prefixes", default=5000, show_default=True, help="Different beginnings of prompts.")
@click.option("--load", default=0.8, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(replicas: int, requests: int, prefixes: int, load: float, seed: int) -> None:
    traffic = Traffic(requests, replicas, load=load, prefixes=prefixes, seed=seed)
    capacity, block_size = traffic.machine.capacity, traffic.machine.block_size
    policies: dict[str, Callable[[], Policy]] = {
        "affinity": lambda: Affinity(replicas, block_size),
        "router": lambda: RequestRouter(dict.fromkeys(range(replicas), capacity)),
        "least_loaded": lambda: LeastLoaded(replicas),
        "round_robin": lambda: RoundRobin(replicas),
    }
    outcomes = {name: simulate(traffic, make()) for name, make in policies.items()}
    results = {name: _told(outcome, requests, outcomes["affinity"].hits) for name, outcome in outcomes.items()}
    sizes = {"replicas": replicas, "requests": requests, "prefixes": prefixes, "load": load, "seed": seed}
    print(json.dumps({"benchmark": "router", **sizes, "results": results}, indent=2))


if __name__ == "__main__":
    main()
