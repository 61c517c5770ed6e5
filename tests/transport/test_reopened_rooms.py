"""Tests of rooms that are opened again after a member has left, and of doors."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.addresses import Address
from shoal.errors import ConfigError
from shoal.transport import connecting
from shoal.transport.channel import Channel, wait
from shoal.transport.connecting import connect
from shoal.transport.rendezvous import Rendezvous, proof
from shoal.transport.room_member import RoomMember
from shoal.wire.base import encode
from shoal.wire.credentials import Credentials
from shoal.wire.rendezvous import (
    Challenge,
    Hello,
    JoinRefused,
    Knock,
    Signed,
    ToRendezvous,
    Welcome,
    hello_decoder,
    to_rendezvous,
)
from support.fakes import steady

pytestmark = pytest.mark.slow

KEY = "a key"


class Door:
    """A door that refuses `refusals` times, then admits."""

    def __init__(self, refusals: int = 0, again: bool = True) -> None:
        self.refusals = refusals
        self.again = again
        self.entered: SimpleQueue[tuple[Hello, Channel]] = SimpleQueue()

    def objection(self, hello: Hello) -> JoinRefused | None:
        self.refusals -= 1
        return JoinRefused("not now", again=self.again) if self.refusals >= 0 else None

    def enter(self, hello: Hello, channel: Channel) -> None:
        self.entered.put((hello, channel))


@pytest.fixture
def meeting() -> Iterator[Rendezvous]:
    with Rendezvous(credentials=Credentials(KEY), reopen_rooms=True) as found:
        yield found


def join(meeting: Rendezvous, rank: int, size: int = 2) -> RoomMember:
    return RoomMember(
        Address.parse(meeting.address), Credentials(KEY), room="room", rank=rank, size=size, agreement={}, timeout=60.0
    )


def all_of(meeting: Rendezvous, ranks: list[int]) -> list[RoomMember]:
    joins: list[Callable[[], RoomMember]] = [lambda rank=rank: join(meeting, rank, len(ranks)) for rank in ranks]  # type: ignore[misc]
    with ThreadPoolExecutor(len(joins)) as pool:
        return [future.result() for future in [pool.submit(one) for one in joins]]


def test_members_after_a_failure_are_in_a_room_of_their_own(meeting: Rendezvous) -> None:
    """The remaining member of the first room gets no messages from the second room, and sends none to it."""
    first = all_of(meeting, [0, 1])
    first[1].close("broke")
    second = all_of(meeting, [0, 1])
    assert [each.formation for each in (*first, *second)] == [0, 0, 1, 1]
    second[0].post("topic", b"second")
    assert second[1].await_post("topic", 0, timeout=60) == b"second"
    first[0].close("broke too")
    second[0].post("topic", b"still there")
    while second[1].latest("topic")[0] != b"still there":
        assert wait([second[1]], 60)  # type: ignore[list-item]
        second[1].clear()
    assert not second[1].failures()
    assert first[0].latest("topic") == {}
    for each in second:
        each.close()


@pytest.mark.slow
@settings(steady, max_examples=10)
@given(leavers=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_formations_are_never_used_twice(leavers: list[int]) -> None:
    with Rendezvous(credentials=Credentials(KEY), reopen_rooms=True) as meeting:
        for count, leaver in enumerate(leavers):
            members = all_of(meeting, [2, 0, 1])
            assert {each.formation for each in members} == {count}
            members[leaver].close("gone")
            for each in members:
                each.close()


def test_a_second_process_with_the_same_rank_is_refused_after_a_while(
    meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not refused immediately, since the first one may be unreachable and not removed yet."""
    monkeypatch.setattr(connecting, "REFUSED_TIMEOUT_S", 0.3)
    members = all_of(meeting, [0, 1])
    with pytest.raises(ConfigError, match=r"rank 1 \(.*\) has already joined: give every process a rank of its own"):
        join(meeting, 1)
    for each in members:
        each.close()


def enter(meeting: Rendezvous, key: str = KEY, **options: Any) -> Channel:
    settings = {"room": "door", "rank": 3, "size": 4, "agreement": {"a": "b"}, "timeout": 60.0, **options}
    return connect(Address.parse(meeting.address), Credentials(key), **settings)


def test_a_connection_through_a_door_works_in_both_directions() -> None:
    door = Door()
    with Rendezvous(credentials=Credentials(KEY), doors={"door": door}) as meeting:
        theirs = enter(meeting)
        hello, ours = door.entered.get(timeout=60)
    assert (hello.rank, hello.size, hello.agreement) == (3, 4, {"a": "b"})
    for sender, receiver in ((theirs, ours), (ours, theirs)):  # even after the end of the rendezvous
        sender.send(b"frame")
        assert wait([receiver], 60)
        assert receiver.receive() == [b"frame"]
    theirs.close()
    ours.close()


def test_a_door_that_refuses_for_now_is_asked_again() -> None:
    door = Door(refusals=2)
    with Rendezvous(credentials=Credentials(KEY), doors={"door": door}) as meeting:
        enter(meeting).close()
        door.entered.get(timeout=60)[1].close()


class FakeTime:
    """A clock that advances by `pause` with each sleep."""

    def __init__(self, pause: float) -> None:
        self.now = 0.0
        self.pause = pause

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += self.pause


Answer = Literal["not now", "hang up", "unreachable", "come in"]


class ScriptedRendezvous:
    """A rendezvous that gives the next of the `answers` to each connection."""

    address = Address("127.0.0.1", 1)

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self._pool = ThreadPoolExecutor(1)

    def connect(self, *_: object) -> socket.socket:
        answer = self.answers.pop(0)
        if answer == "unreachable":
            raise OSError("refused")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            found = socket.create_connection(listener.getsockname())
            self._pool.submit(self._serve, Channel(listener.accept()[0]), answer)
        return found

    @staticmethod
    def _serve(channel: Channel, answer: Answer) -> None:
        with closing(channel):
            if answer == "hang up":
                return
            channel.send(encode(Challenge(bytes(32))))
            received = list[ToRendezvous]()
            while len(received) < 2:
                assert wait([channel], 60)
                received += [to_rendezvous.decode(frame) for frame in channel.receive()]
            knock, signed = received
            assert isinstance(knock, Knock)
            assert isinstance(signed, Signed)
            nonce = hello_decoder.decode(signed.hello).nonce
            welcome = Welcome(proof(KEY, "rendezvous", nonce, signed.hello))
            channel.send(encode(welcome if answer == "come in" else JoinRefused("not now", again=True)))
            channel.flush(60)


def test_only_consecutive_refusals_end_the_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal and a long time without an answer, another refusal counts as the first one."""
    script = ScriptedRendezvous()
    monkeypatch.setattr(connecting, "time", FakeTime(connecting.REFUSED_TIMEOUT_S * 2))
    monkeypatch.setattr("shoal.transport.connecting.addresses.connect", script.connect)
    script.answers = ["not now", "hang up", "not now", "unreachable", "not now", "come in"]
    connect(script.address, Credentials(KEY), timeout=1e6).close()
    script.answers = ["not now", "not now"]
    with pytest.raises(ConfigError, match="not now"):
        connect(script.address, Credentials(KEY), timeout=1e6)
    script.answers = [*["not now"] * 9, "come in"]  # type: ignore[list-item]
    connect(script.address, Credentials(KEY), timeout=1e6, returning=True).close()  # a returning process keeps trying
    assert not script.answers


def test_a_final_refusal_of_a_door_shows_its_reason() -> None:
    with (
        Rendezvous(credentials=Credentials(KEY), doors={"door": Door(refusals=1, again=False)}) as meeting,
        pytest.raises(ConfigError, match=r"rank 3 may not join at .*: not now"),
    ):
        enter(meeting)


def test_a_process_with_another_key_does_not_reach_the_door() -> None:
    door = Door()
    with Rendezvous(credentials=Credentials(KEY), doors={"door": door}) as meeting:
        with pytest.raises(ConfigError, match="the shared key differs"):
            enter(meeting, "another key")
        assert door.entered.empty()
