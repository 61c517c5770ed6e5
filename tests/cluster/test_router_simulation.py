"""The router with simulated replicas: balanced like round robin, with nearly as many prefix hits as pure affinity.

With --matrix there are also 1,000 replicas with 100,000 requests, which `benchmarks/router.py` times.
"""

import pytest

from shoal.cluster.routing.router import RequestRouter
from support.simulated_replicas import Affinity, LeastLoaded, Outcome, RoundRobin, Traffic, simulate


def routed(traffic: Traffic) -> tuple[Outcome, RequestRouter]:
    found = RequestRouter(dict.fromkeys(range(traffic.replicas), traffic.machine.capacity))
    return simulate(traffic, found), found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "replicas" in metafunc.fixturenames:
        full = [(1000, 0.8)] if metafunc.config.getoption("--matrix") else []
        metafunc.parametrize(("replicas", "load"), [(50, 0.8), (50, 1.6), (8, 0.8), (2, 0.8), *full])


@pytest.mark.slow
def test_balance_and_prefix_hits(replicas: int, load: float) -> None:
    """At a load of 1.6, queues grow unless most prompt tokens come from caches."""
    traffic = Traffic(100 * replicas, replicas, load=load, prefixes=5 * replicas)
    outcome, found = routed(traffic)
    affinity = simulate(traffic, Affinity(replicas, traffic.machine.block_size))
    assert outcome.busiest <= 1.15
    assert outcome.hits >= 0.85 * affinity.hits
    found.audit()
    assert found.ledger.num_waiting == 0
    assert all(found.ledger.num_held_by(number) == found.ledger.work_of(number) == 0 for number in range(replicas))


def test_the_first_token_comes_sooner_than_with_balancing_alone() -> None:
    traffic = Traffic(5000, 50, prefixes=250)
    outcome, _ = routed(traffic)
    for other in (RoundRobin(50), LeastLoaded(50)):
        spread = simulate(traffic, other)
        assert outcome.hits > 1.5 * spread.hits
        assert sum(outcome.first_token_s) < 0.7 * sum(spread.first_token_s)
        assert outcome.busiest < spread.busiest


def test_one_popular_prefix_does_not_send_all_traffic_to_one_replica() -> None:
    outcome, _ = routed(Traffic(2000, 20, prefixes=1))
    assert outcome.busiest <= 1.15
    assert min(outcome.computed) * 20 >= 0.85 * sum(outcome.computed)


def test_no_replica_is_idle_while_requests_wait() -> None:
    """The load is far more than the replicas can compute."""
    traffic = Traffic(2000, 10, load=20, prefixes=50)
    outcome, _ = routed(traffic)
    assert outcome.busiest <= 1.15
    assert outcome.seconds <= 1.1 * simulate(traffic, LeastLoaded(10)).seconds
