"""An engine that threads use in turns: the order of turns, interrupts between them, and forked processes."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.errors import ClosedError, EngineError
from shoal.llm.shared_engine import FairLock, SharedEngine
from shoal.process.interrupts import interrupts

DEADLINE_S = 30


@pytest.fixture(autouse=True)
def _handler_of_python() -> Iterator[None]:
    """Install Python's handler, because the parent process of the tests may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_turns_come_in_the_order_of_requests() -> None:
    lock, order, waiting = FairLock(), list[int](), threading.Semaphore(0)

    def take(number: int) -> None:
        waiting.release()
        with lock.turn():
            order.append(number)

    threads = []
    with lock.turn():
        assert lock.is_mine
        for number in range(5):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            assert waiting.acquire(timeout=DEADLINE_S)
            while lock.waiting < number + 1:
                threads[-1].join(0.001)
    for thread in threads:
        thread.join(DEADLINE_S)
    assert order == [0, 1, 2, 3, 4]
    assert not lock.is_mine


def test_a_thread_that_gives_up_does_not_block_others() -> None:
    lock = FairLock()
    with lock.turn():
        found: list[bool] = []

        def impatient() -> None:
            with lock.turn(0.01) as came:
                found.append(came)

        thread = threading.Thread(target=impatient)
        thread.start()
        thread.join(DEADLINE_S)
        assert found == [False]
        assert lock.is_mine
    with lock.turn(DEADLINE_S) as came:
        assert came


def test_an_interrupt_waits_for_the_end_of_the_outermost_block() -> None:
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
        pass  # the two signals counted as one, so none is left


def test_an_interrupt_that_a_check_has_raised_is_not_raised_again() -> None:
    def work() -> None:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            try:
                interrupts.check()
            finally:
                signal.raise_signal(signal.SIGINT)  # a second signal, while the first exception is handled

    with pytest.raises(KeyboardInterrupt):
        work()
    with interrupts.held():
        interrupts.check()


def test_an_interrupt_is_raised_even_if_the_block_raises_an_error() -> None:
    def fail() -> None:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            raise EngineError("mine")

    with pytest.raises(KeyboardInterrupt) as found:
        fail()
    assert isinstance(found.value.__cause__, EngineError)


def test_the_programs_own_signal_handler_is_kept() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_blocks_of_other_threads_do_not_delay_interrupts() -> None:
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


def test_a_closed_engine_gives_no_turns() -> None:
    client: Any = Client()
    engine = SharedEngine(client)
    engine.close()
    assert client.closed == 1
    with pytest.raises(ClosedError, match="was closed"), engine.turn():
        pass


def test_a_forked_process_is_refused_and_cannot_close(monkeypatch: pytest.MonkeyPatch) -> None:
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
