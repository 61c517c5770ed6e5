"""The rule for replacing ranks that have died."""

from shoal.engine.rank_deaths import RankDeaths
from shoal.engine.request import Request
from support.fakes import FakeClock, request


def in_flight(seq: int, tokens: int) -> Request:
    """Return a request that has some tokens."""
    return Request(request(seq, [1]), sort_key=(0,), tokens=[1] * tokens, num_prompt_tokens=1, salt=None)


def test_ranks_that_work_between_their_deaths_are_always_replaced() -> None:
    deaths = RankDeaths(FakeClock())
    for _ in range(10):
        assert deaths.note_death([]) == ""
        deaths.note_work()


def test_the_third_death_without_work_is_one_too_many() -> None:
    deaths = RankDeaths(FakeClock())
    assert [deaths.note_death([]) for _ in range(2)] == ["", ""]
    assert deaths.note_death([]) == "ranks have died 3 times in a row before any step was computed"


def test_ranks_that_have_lived_long_without_requests_are_replaced() -> None:
    clock = FakeClock()
    deaths = RankDeaths(clock)
    for _ in range(5):
        clock.now += 61
        assert deaths.note_death([]) == ""


def test_a_request_that_makes_no_progress_between_deaths_may_be_the_cause() -> None:
    """A death while ranks are being replaced has no requests in flight, and says nothing about them."""
    deaths = RankDeaths(FakeClock())
    found = []
    for length in (5, 6, 7):
        found.append(deaths.note_death([in_flight(1, length), in_flight(2, 100 * length)]))
        deaths.note_work()
        if length == 5:
            assert deaths.note_death([]) == ""
            deaths.note_work()
    assert found == ["", "", "ranks have died 3 times with the same request"]


def test_a_request_that_makes_progress_between_deaths_is_not_the_cause() -> None:
    deaths = RankDeaths(FakeClock())
    for length in range(1, 200, 16):
        assert deaths.note_death([in_flight(1, length)]) == ""
        deaths.note_work()
