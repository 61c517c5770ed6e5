"""The rule of restarts, and the queue of times at which requests expire."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.expiry_queue import ExpiryQueue
from shoal.cluster.replicas.restart_budget import RestartBudget
from support.fakes import steady


def test_pauses_double_after_useless_runs_until_a_useful_one() -> None:
    restarts = RestartBudget(100)
    assert [restarts.pause(float(at), useful=False) for at in range(4)] == [0.5, 1.0, 2.0, 4.0]
    assert restarts.pause(5.0, useful=True) == 0.0
    assert restarts.pause(6.0, useful=False) == 0.5


def test_useless_runs_in_a_row_are_limited() -> None:
    restarts = RestartBudget(100)
    assert [restarts.pause(0.0, useful=False) is None for _ in range(5)] == [False] * 4 + [True]
    assert restarts.why_not == "it ended 5 times in a row before it had done any work"


def test_restarts_are_limited_within_an_hour() -> None:
    restarts = RestartBudget(2, "--max-restarts")
    assert [restarts.pause(at, useful=True) for at in (0.0, 10.0, 20.0)] == [0.0, 0.0, None]
    assert restarts.why_not == "it was started again 2 times within an hour (--max-restarts 2)"
    assert restarts.pause(3605.0, useful=True) == 0.0


@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=300), st.integers(0, 25))
@steady
def test_timers_expire_like_those_of_a_sorted_list(entries: list[tuple[int, bool]], now: int) -> None:
    still_open = {seq for seq, (_, stays) in enumerate(entries) if stays}
    timers = ExpiryQueue(still_open.__contains__)
    for seq, (when, _) in enumerate(entries):
        timers.add(float(when), seq)
    times = [when for when, stays in entries if stays]
    assert timers.next_time == min(times, default=None)
    expired = timers.pop_expired(float(now))
    assert sorted(expired) == [seq for seq, (when, stays) in enumerate(entries) if stays and when <= now]
    assert [entries[seq][0] for seq in expired] == sorted(entries[seq][0] for seq in expired)
    timers.clean()
    assert len(timers) == sum(when > now for when in times)
