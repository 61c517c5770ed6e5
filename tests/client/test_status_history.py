"""Rates and busy shares from the last statuses of a server."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.status_history import SPAN_S, StatusHistory
from shoal.errors import UserError
from shoal.server.operations.status import status_json
from shoal.wire.fleet import FleetStatus
from support.fakes import steady
from support.fleet_status import engine, fleet, ranks, replica


def as_json(status: FleetStatus) -> Any:
    return json.loads(json.dumps(status_json(status)))


def test_rates_come_from_two_statuses() -> None:
    history = StatusHistory()
    history.add(as_json(fleet(replica(0, stats=engine(generated=100, prompt=50, of_ranks=ranks())), uptime=10)))
    assert history.rates() is None
    stats = engine(generated=160, prompt=350, queries=40, hits=10)
    history.add(as_json(fleet(replica(0, stats=stats), replica(1, stats=stats), uptime=12)))
    rates = history.rates()
    assert rates is not None
    assert (rates.generated, rates.prompt, rates.queries, rates.hits) == (30, 150, 40, 10)
    assert history.rates_of(1) is None, "it is only in the last status"


def busy_share(*reports: tuple[float, int, int]) -> float | None:
    """Return the busy share of rank 1 after statuses with these times, processes and microseconds."""
    history = StatusHistory()
    for uptime, pid, busy_us in reports:
        of_ranks = ranks(first_pid=pid, busy_us=busy_us)
        history.add(as_json(fleet(replica(0, stats=engine(of_ranks=of_ranks)), uptime=uptime)))
    return history.busy_share(0, 1)


def test_busy_shares_come_from_changed_values() -> None:
    assert busy_share((10, 1, 0)) is None
    assert busy_share((10, 1, 0), (11, 1, 4_000_000)) is None, "the first change may cover more than a second"
    assert busy_share((10, 1, 0), (11, 1, 4_000_000), (12, 1, 4_000_000), (16, 1, 6_000_000)) == pytest.approx(0.4)
    assert busy_share((10, 1, 0), (11, 1, 1_000_000), (12, 1, 9_000_000)) == 1.0


def test_a_rank_whose_numbers_do_not_change_is_idle() -> None:
    news = ((10, 1, 0), (11, 1, 1_000_000), (12, 1, 1_500_000))
    assert busy_share(*news, (19, 1, 1_500_000)) == 0.5
    assert busy_share(*news, (21, 1, 1_500_000)) == 0.0


def test_a_new_process_has_no_busy_share_yet() -> None:
    assert busy_share((10, 1, 0), (11, 1, 1_000_000), (12, 1, 1_500_000), (13, 2, 100)) is None


def test_a_restarted_server_starts_a_new_history() -> None:
    history = StatusHistory()
    history.add(as_json(fleet(replica(0, stats=engine(generated=1000)), uptime=100)))
    history.add(as_json(fleet(replica(0, stats=engine(generated=5)), uptime=1)))
    assert history.rates() is None
    history.add(as_json(fleet(replica(0, stats=engine(generated=9)), uptime=3)))
    rates = history.rates()
    assert rates is not None
    assert rates.generated == 2


@pytest.mark.parametrize("other", [[], {"object": "list"}, "ok", None])
def test_other_values_than_a_status_are_refused(other: Any) -> None:
    with pytest.raises(UserError, match="is it a server of this version"):
        StatusHistory().add(other)


steps = st.lists(st.tuples(st.floats(0.1, 3), st.integers(0, 1000)), min_size=1, max_size=30)


@steady
@given(steps)
def test_rates_are_over_the_last_seconds(steps: list[tuple[float, int]]) -> None:
    """The rates are over the time since the newest status that is SPAN_S old, or since the first."""
    history, added = StatusHistory(), [(5.0, 0)]
    history.add(as_json(fleet(replica(0, stats=engine()), uptime=5)))
    for seconds, tokens in steps:
        added.append((added[-1][0] + seconds, added[-1][1] + tokens))
        now = added[-1]
        history.add(as_json(fleet(replica(0, stats=engine(generated=now[1])), uptime=now[0])))
        before = max((each for each in added[:-1] if now[0] - each[0] >= SPAN_S), default=added[0])
        rates = history.rates()
        assert rates is not None
        assert rates.generated == pytest.approx((now[1] - before[1]) / (now[0] - before[0]))
