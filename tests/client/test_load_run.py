"""Open and closed loops, in virtual time."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.client.http import ServerClient
from shoal.client.load.load_run import LoadRun, Requester
from shoal.client.load.outcome import LoadOutcome
from shoal.client.load.workload import PlannedRequest
from support.fakes import steady
from support.virtual_time import run_virtually


class SlowRequester(Requester):
    """A requester whose answer to request i takes `seconds[i]`."""

    def __init__(self, client: ServerClient, seconds: list[float]) -> None:
        super().__init__(client, chat=False, model="m", extra={}, clock=asyncio.get_running_loop().time)
        self._seconds = seconds
        self.running = self.peak = 0

    async def send(self, request: PlannedRequest) -> LoadOutcome:
        sent = self.now()
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self._seconds[request.index])
        finally:
            self.running -= 1
        arrival = sent if request.arrival is None else request.arrival
        return LoadOutcome(request, arrival, sent, self.now())


def drive(
    arrivals: list[float] | list[None],
    seconds: list[float],
    *,
    stop_at: float | None = None,
    done: Callable[[LoadOutcome], None] | None = None,
    max_concurrency: int | None = None,
    duration: float | None = None,
) -> tuple[list[LoadOutcome], LoadRun, SlowRequester, bool]:
    outcomes: list[LoadOutcome] = []

    async def main() -> tuple[LoadRun, SlowRequester, bool]:
        async with ServerClient("http://nowhere") as client:
            requester = SlowRequester(client, seconds)
            planned = (PlannedRequest(index, at, "", 0, 1) for index, at in enumerate(arrivals))
            run = LoadRun(
                requester, planned, done or outcomes.append, max_concurrency=max_concurrency, duration=duration
            )
            stop = asyncio.Event()
            if stop_at is not None:
                asyncio.get_running_loop().call_later(stop_at, stop.set)
            return run, requester, await run.run(stop)

    return outcomes, *run_virtually(main())


durations = st.lists(st.floats(0.01, 5), min_size=1, max_size=30)


@pytest.mark.slow
@steady
@given(durations, st.data())
def test_slow_answers_delay_no_other_request(seconds: list[float], data: st.DataObject) -> None:
    count = len(seconds)
    arrivals = sorted(data.draw(st.lists(st.floats(0, 10), min_size=count, max_size=count)))
    outcomes, run, requester, complete = drive(arrivals, seconds)
    assert complete
    assert sorted(each.request.index for each in outcomes) == list(range(count))
    for each in outcomes:
        assert each.late == pytest.approx(0.0, abs=1e-6)
        assert each.e2e == pytest.approx(seconds[each.request.index], abs=1e-6)
    assert run.peak == requester.peak
    assert (run.running, run.broken_off) == (0, 0)


@steady
@given(durations, st.integers(1, 8))
def test_a_closed_loop_keeps_all_places_taken(seconds: list[float], places: int) -> None:
    arrivals: list[None] = [None] * len(seconds)
    outcomes, run, requester, complete = drive(arrivals, seconds, max_concurrency=places)
    assert complete
    assert run.peak == requester.peak == min(places, len(seconds))
    free = [0.0] * places  # a free place is taken at once, in the order of requests
    for each in sorted(outcomes, key=lambda each: each.request.index):
        free.sort()
        assert each.sent == pytest.approx(free[0], abs=1e-6)
        assert each.late == 0.0
        free[0] += seconds[each.request.index]


@steady
@given(durations, st.integers(1, 4))
def test_waiting_for_a_place_counts_as_latency(seconds: list[float], places: int) -> None:
    outcomes, _, requester, _ = drive([0.0] * len(seconds), seconds, max_concurrency=places)
    assert requester.peak == min(places, len(seconds))
    for each in outcomes:
        assert each.e2e == pytest.approx(each.late + seconds[each.request.index], abs=1e-6)
    assert max(each.late for each in outcomes) > 0 or len(seconds) <= places


def test_a_closed_loop_ends_after_its_duration() -> None:
    """With two places and answers of 3 s, the third and last pair starts at 6 s and is completed."""
    outcomes, _, _, complete = drive([None] * 99, [3.0] * 99, max_concurrency=2, duration=7.0)
    assert complete
    assert len(outcomes) == 6
    assert max(each.ended for each in outcomes) == pytest.approx(9.0, abs=1e-6)


def test_a_stop_breaks_off_running_requests() -> None:
    outcomes, run, requester, complete = drive([0.0, 1.0, 2.0, 9.0], [0.5, 9.0, 9.0, 9.0], stop_at=3.0)
    assert not complete
    assert [each.request.index for each in outcomes] == [0]
    assert (run.broken_off, run.running, requester.running) == (2, 0, 0)


def test_overdue_requests_are_broken_off_too() -> None:
    """Otherwise a server that is too slow would look better."""
    outcomes, run, _, complete = drive([0.0] * 5, [2.0] * 5, max_concurrency=2, stop_at=3.0)
    assert not complete
    assert (len(outcomes), run.broken_off, run.running) == (2, 3, 0)


def test_an_error_of_done_ends_the_run() -> None:
    def full(outcome: LoadOutcome) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        drive([0.0, 5.0], [1.0, 1.0], done=full)
