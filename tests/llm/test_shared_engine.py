"""Who may use an engine when: threads in turns, Ctrl-C between two of them, and no forked child."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.errors import ClosedError, EngineError
from shoal.llm.shared_engine import Queue, SharedEngine
from shoal.process.interrupts import interrupts

DEADLINE_S = 30


@pytest.fixture(autouse=True)
def _handler_of_python() -> Iterator[None]:
    """Whoever started the tests may have SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_turns_come_in_the_order_in_which_they_were_asked_for() -> None:
    queue, order, waiting = Queue(), list[int](), threading.Semaphore(0)

    def take(number: int) -> None:
        waiting.release()
        with queue.turn():
            order.append(number)

    threads = []
    with queue.turn():
        assert queue.is_mine
        for number in range(5):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            assert waiting.acquire(timeout=DEADLINE_S)
            while queue.waiting < number + 1:
                threads[-1].join(0.001)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert order == [0, 1, 2, 3, 4]
    assert not queue.is_mine


def test_whoever_gives_up_its_place_holds_nobody_up() -> None:
    queue = Queue()
    with queue.turn():
        found: list[bool] = []

        def impatient() -> None:
            with queue.turn(0.01) as came:
                found.append(came)

        thread = threading.Thread(target=impatient)
        thread.start()
        thread.join(DEADLINE_S)
        assert found == [False]
        assert queue.is_mine
    with queue.turn(DEADLINE_S) as came:
        assert came


def test_an_interrupt_waits_for_the_end_of_what_holds_it() -> None:
    steps = []

    def work() -> None:
        with interrupts.held():
            with interrupts.held():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                steps.append("inner")
            steps.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["inner", "outer"]
    with interrupts.held():
        pass  # the two have counted as one


def test_an_interrupt_that_was_looked_for_comes_once() -> None:
    def work() -> None:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            try:
                interrupts.check()
            finally:
                signal.raise_signal(signal.SIGINT)  # while what it has ended is put away

    with pytest.raises(KeyboardInterrupt):
        work()
    with interrupts.held():
        interrupts.check()


def test_an_interrupt_is_not_lost_with_an_error() -> None:
    def fail() -> None:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            raise EngineError("mine")

    with pytest.raises(KeyboardInterrupt) as found:
        fail()
    assert isinstance(found.value.__cause__, EngineError)


def test_a_handler_of_the_programs_own_is_left_alone() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_hold_nothing() -> None:
    def work() -> None:
        with interrupts.held():
            entered.set()
            assert leave.wait(DEADLINE_S)

    entered, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert entered.wait(DEADLINE_S)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        leave.set()
        thread.join(DEADLINE_S)


class Client:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_closing_ends_the_turns_of_others() -> None:
    client: Any = Client()
    engine = SharedEngine(client)
    engine.close()
    assert client.closed == 1
    with pytest.raises(ClosedError, match="was closed"), engine.turn():
        pass


def test_another_process_is_refused_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = Client()
    engine = SharedEngine(client)
    mine = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: mine + 1)
    with (
        pytest.raises(ClosedError, match=rf"belongs to process {mine}, from which this one \({mine + 1}\) was forked"),
        engine.turn(),
    ):
        pass
    engine.close()
    assert client.closed == 0
