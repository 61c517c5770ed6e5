"""Tests of the messages of a rank's process, which two threads read."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.transport.channel import Channel, ChannelClosed
from shoal.wire.base import encode
from shoal.wire.ranks import RankCall, RankSetup, ToRankProcess
from shoal.worker.inbox import Inbox
from support.example_counts import examples
from support.plans import bare_plan, setup_of

CALLS = [RankCall(number, "stats") for number in range(8)]
SETUP = setup_of(bare_plan())


class Engine:
    """The other end of an inbox's channel, and what the inbox has told of messages that arrived."""

    def __init__(self) -> None:
        self.channel, theirs = Channel.pair()
        self.arrived: list[ToRankProcess] = []
        self.setups = threading.Event()
        self._theirs = Channel(theirs)
        self.inbox = Inbox(self._theirs, self._note)

    def _note(self, message: ToRankProcess) -> None:
        self.arrived.append(message)
        if isinstance(message, RankSetup):
            self.setups.set()

    def close(self) -> None:
        self.channel.close()
        self._theirs.close()

    def send(self, *messages: ToRankProcess) -> None:
        for message in messages:
            self.channel.send(encode(message))


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.close()


def test_messages_are_taken_in_their_order(engine: Engine) -> None:
    engine.send(*CALLS)
    assert [engine.inbox.get() for _ in CALLS] == CALLS


def test_a_message_ends_the_wait_for_it(engine: Engine) -> None:
    found: list[ToRankProcess] = []
    waiting = threading.Thread(target=lambda: found.append(engine.inbox.get()))
    waiting.start()
    engine.send(CALLS[0])
    waiting.join(60)
    assert found == CALLS[:1]


def test_a_setup_is_noticed_while_the_main_thread_computes(engine: Engine) -> None:
    engine.send(CALLS[0], CALLS[1], SETUP, CALLS[2])
    while not engine.setups.is_set():
        engine.inbox.watch(0.01)
    assert [engine.inbox.get() for _ in range(2)] == [SETUP, CALLS[2]]


def test_both_threads_learn_of_the_end(engine: Engine) -> None:
    engine.send(CALLS[0])
    engine.channel.close()
    assert engine.inbox.get() == CALLS[0]
    with pytest.raises(ChannelClosed):
        engine.inbox.get()
    with pytest.raises(ChannelClosed):
        engine.inbox.watch(60)


def test_a_resting_watch_goes_on_when_a_message_is_taken(engine: Engine) -> None:
    """It must not sleep on for its whole time: the main thread may be busy for long with what it has taken."""

    def watch() -> None:
        with contextlib.suppress(ChannelClosed):
            engine.inbox.watch(600)

    watching = threading.Thread(target=watch)
    main = threading.Thread(target=engine.inbox.get)
    main.start()
    watching.start()
    engine.send(CALLS[0])
    main.join(60)  # from now on the main thread computes
    engine.send(SETUP)
    assert engine.setups.wait(60)
    engine.channel.close()
    watching.join(60)


@given(
    sent=st.lists(st.lists(st.integers(-1, 7), max_size=5), max_size=8), taken=st.lists(st.integers(0, 3), max_size=8)
)
@settings(max_examples=examples(30), deadline=None)
def test_each_message_is_taken_once_unless_a_setup_follows_it(sent: Sequence[list[int]], taken: Sequence[int]) -> None:
    engine, expected, found = Engine(), list[ToRankProcess](), list[ToRankProcess]()
    for turn, numbers in enumerate(sent):
        for number in numbers:
            message = SETUP if number < 0 else CALLS[number]
            expected = [message] if number < 0 else [*expected, message]
            engine.send(message)
        engine.inbox.watch(1e-6)
        for _ in range(min(taken[turn] if turn < len(taken) else 0, len(expected))):
            assert engine.inbox.get() == expected.pop(0)
    found += [engine.inbox.get() for _ in expected]
    assert found == expected
    engine.close()
