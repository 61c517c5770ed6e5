"""The order in which requests wait, and their deadlines."""

from shoal.engine.request import Request, RequestState
from shoal.engine.scheduler.waiting_queue import Deadlines, WaitingQueue
from support.fakes import FakeClock, request


def waiting(seq: int, *sort_key: int) -> Request:
    message = request(seq, [1] * seq)
    return Request(message, sort_key, [1] * seq, seq, None)


def test_the_lowest_key_is_first_and_ties_go_by_sequence_number() -> None:
    queue = WaitingQueue()
    for seq, key in [(4, 1), (3, 0), (2, 0), (1, 2)]:
        queue.push(waiting(seq, key))
    order = []
    while (first := queue.first()) is not None:
        queue.pop()
        order.append(first.message.seq)
    assert order == [2, 3, 4, 1]


def test_requests_that_no_longer_wait_are_skipped() -> None:
    queue = WaitingQueue()
    ended, other = waiting(1, 0), waiting(2, 1)
    queue.push(ended)
    queue.push(other)
    ended.state = RequestState.FINISHED
    assert queue.tokens_of_first(2) == 2
    assert queue.first() is other


def test_a_preempted_request_waits_again_when_its_results_have_come() -> None:
    queue = WaitingQueue()
    preempted = waiting(1, 0)
    preempted.state, preempted.in_flight = RequestState.DRAINING, 1
    queue.push_if_drained(preempted)
    assert queue.first() is None
    preempted.in_flight = 0
    queue.push_if_drained(preempted)
    assert queue.first() is preempted
    assert preempted.epoch == 1


def test_deadlines_pass_in_order() -> None:
    clock = FakeClock()
    deadlines = Deadlines(clock)
    for seq, seconds in [(1, 3), (2, 1), (3, 2)]:
        deadlines.add(clock.now + seconds, seq)
    assert deadlines.pop_passed({1, 2, 3}) == []
    clock.now += 2
    assert deadlines.pop_passed({1, 2, 3}) == [2, 3]
    assert deadlines.pop_passed({1, 2, 3}) == []


def test_deadlines_of_requests_that_have_ended_are_dropped() -> None:
    """Otherwise a server would remember each request until its deadline."""
    clock = FakeClock()
    deadlines = Deadlines(clock)
    for seq in range(1000):
        deadlines.add(clock.now + 5, seq)
    assert deadlines.pop_passed({7}) == []
    clock.now += 5
    assert deadlines.pop_passed({7}) == [7]
