"""Rates out of two readings, whatever comes between them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.readings import SPAN_S, Readings
from shoal.errors import UserError
from shoal.server.operations.status import status_json
from shoal.wire.fleet import FleetStatus
from support.fakes import steady
from support.fleet_status import engine, fleet, ranks, replica


def plain(status: FleetStatus) -> Any:
    return json.loads(json.dumps(status_json(status)))


def test_rates_come_from_two_readings() -> None:
    readings = Readings()
    readings.add(plain(fleet(replica(0, stats=engine(generated=100, prompt=50, of_ranks=ranks())), uptime=10)))
    assert readings.growth() is None
    stats = engine(generated=160, prompt=350, queries=40, hits=10)
    readings.add(plain(fleet(replica(0, stats=stats), replica(1, stats=stats), uptime=12)))
    growth = readings.growth()
    assert growth is not None
    assert (growth.generated, growth.prompt, growth.queries, growth.hits) == (30, 150, 40, 10)
    assert readings.growth_of(1) is None, "it has been there once"


def busy(*reports: tuple[float, int, int]) -> float | None:
    """Of rank 1 after readings at these times, with these pids and microseconds."""
    readings = Readings()
    for uptime, pid, busy_us in reports:
        of_ranks = ranks(first_pid=pid, busy_us=busy_us)
        readings.add(plain(fleet(replica(0, stats=engine(of_ranks=of_ranks)), uptime=uptime)))
    return readings.busy(0, 1)


def test_busy_shares_come_from_news() -> None:
    assert busy((10, 1, 0)) is None
    assert busy((10, 1, 0), (11, 1, 4_000_000)) is None, "it may be of longer than a second"
    assert busy((10, 1, 0), (11, 1, 4_000_000), (12, 1, 4_000_000), (16, 1, 6_000_000)) == pytest.approx(0.4)
    assert busy((10, 1, 0), (11, 1, 1_000_000), (12, 1, 9_000_000)) == 1.0


def test_a_rank_that_says_nothing_new_is_idle() -> None:
    news = ((10, 1, 0), (11, 1, 1_000_000), (12, 1, 1_500_000))
    assert busy(*news, (19, 1, 1_500_000)) == 0.5
    assert busy(*news, (21, 1, 1_500_000)) == 0.0


def test_another_process_has_no_busy_share_yet() -> None:
    assert busy((10, 1, 0), (11, 1, 1_000_000), (12, 1, 1_500_000), (13, 2, 100)) is None


def test_a_server_that_was_started_anew_begins_from_nothing() -> None:
    readings = Readings()
    readings.add(plain(fleet(replica(0, stats=engine(generated=1000)), uptime=100)))
    readings.add(plain(fleet(replica(0, stats=engine(generated=5)), uptime=1)))
    assert readings.growth() is None
    readings.add(plain(fleet(replica(0, stats=engine(generated=9)), uptime=3)))
    growth = readings.growth()
    assert growth is not None
    assert growth.generated == 2


@pytest.mark.parametrize("other", [[], {"object": "list"}, "ok", None])
def test_something_else_is_refused(other: Any) -> None:
    with pytest.raises(UserError, match="is it a server of this version"):
        Readings().add(other)


steps = st.lists(st.tuples(st.floats(0.1, 3), st.integers(0, 1000)), min_size=1, max_size=30)


@steady
@given(steps)
def test_rates_are_over_the_last_seconds(steps: list[tuple[float, int]]) -> None:
    """Held against the definition: the newest reading that is SPAN_S old, or the first."""
    readings, history = Readings(), [(5.0, 0)]
    readings.add(plain(fleet(replica(0, stats=engine()), uptime=5)))
    for seconds, tokens in steps:
        history.append((history[-1][0] + seconds, history[-1][1] + tokens))
        now = history[-1]
        readings.add(plain(fleet(replica(0, stats=engine(generated=now[1])), uptime=now[0])))
        before = max((each for each in history[:-1] if now[0] - each[0] >= SPAN_S), default=history[0])
        growth = readings.growth()
        assert growth is not None
        assert growth.generated == pytest.approx((now[1] - before[1]) / (now[0] - before[0]))
