"""Tests of a rendezvous: the order of starts, refusals and their reasons, and the messages between members."""

import errno
import logging
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shoal.addresses import Address
from shoal.errors import ConfigError, EngineError
from shoal.transport import connecting as connecting_module
from shoal.transport import rendezvous as rendezvous_module
from shoal.transport import room_member as members_module
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.connecting import connect
from shoal.transport.rendezvous import Rendezvous, enable_keepalive, proof, require_key
from shoal.transport.room_member import RoomMember
from shoal.wire.base import encode
from shoal.wire.credentials import Credentials
from shoal.wire.rendezvous import (
    Alive,
    Challenge,
    Hello,
    JoinRefused,
    Knock,
    RoomComplete,
    RoomMessage,
    Signed,
    StoreGet,
    StoreSet,
    StoreValue,
    Welcome,
    from_rendezvous,
    hello_decoder,
    to_rendezvous,
)
from support.descriptors import many_open_files

pytestmark = pytest.mark.slow

KEY = "a key"
OURS = Credentials(KEY)


@pytest.fixture
def meeting() -> Iterator[Rendezvous]:
    with Rendezvous(credentials=OURS) as found:
        yield found


def join(meeting: Rendezvous, rank: int, size: int = 2, key: str = KEY, **options: Any) -> RoomMember:
    settings = {"room": "room", "agreement": {}, "timeout": 60.0, **options}
    return RoomMember(Address.parse(meeting.address), Credentials(key), rank=rank, size=size, **settings)


def together(joins: list[Callable[[], RoomMember]]) -> list[RoomMember]:
    with ThreadPoolExecutor(len(joins)) as pool:
        return [future.result() for future in [pool.submit(one) for one in joins]]


def both(meeting: Rendezvous) -> list[RoomMember]:
    return together([lambda rank=rank: join(meeting, rank) for rank in range(2)])  # type: ignore[misc]


def test_members_in_any_order_learn_of_each_other(meeting: Rendezvous) -> None:
    ranks = list(range(5))
    random.Random(1).shuffle(ranks)
    found = together([lambda rank=rank: join(meeting, rank, 5) for rank in ranks])  # type: ignore[misc]
    for each in found:
        assert [name.split()[1] for name in each.members] == [str(rank) for rank in range(5)]
        each.close()


def test_a_member_may_come_before_the_rendezvous() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = Address("127.0.0.1", port)
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(connect, address, OURS, timeout=60.0)
        with Rendezvous(port=port, credentials=OURS):
            early.result().close()


def test_an_error_without_a_rendezvous_names_address_port_and_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"no answer from 127.0.0.1:{port} within 0.5 s \(.*refused\)"):
        connect(Address("127.0.0.1", port), OURS, timeout=0.5)


@pytest.mark.slow
def test_a_missing_rendezvous_is_an_engine_error_for_a_returning_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = Address("127.0.0.1", probe.getsockname()[1])
        with pytest.raises(EngineError, match="did not answer in time"):  # it is suspended
            connect(address, OURS, timeout=0.5, returning=True)
    with pytest.raises(EngineError, match=r"no answer from .* within 0.5 s \(.*refused\)"):
        connect(address, OURS, timeout=0.5, returning=True)
    with Rendezvous(credentials=OURS) as meeting:
        with pytest.raises(EngineError, match=r"within 1 s: rank 0 missing"):
            RoomMember(Address.parse(meeting.address), OURS, room="room", rank=1, size=2, timeout=1.0, returning=True)
        with pytest.raises(ConfigError, match="the shared key differs"):
            connect(Address.parse(meeting.address), Credentials("another key"), timeout=60.0, returning=True)


def test_a_rendezvous_that_ends_before_the_room_is_complete_is_an_engine_error() -> None:
    with ThreadPoolExecutor(1) as pool:
        with Rendezvous(credentials=OURS) as meeting:
            waiting = pool.submit(join, meeting, 1)
            arrive(meeting)
        with pytest.raises(EngineError, match=r"the rendezvous at .* has gone"):
            waiting.result()


def test_another_program_at_the_address_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = Address("127.0.0.1", probe.getsockname()[1])
        with pytest.raises(ConfigError, match="is another program there"):
            connect(address, OURS, timeout=0.5)


def test_a_closed_connection_is_tried_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        address = Address("127.0.0.1", listener.getsockname()[1])
        coming = pool.submit(connect, address, OURS, timeout=60.0)
        for _ in range(2):
            listener.accept()[0].close()
        host(listener).close()
        coming.result().close()


def test_a_rendezvous_that_ends_during_the_handshake_is_tried_again() -> None:
    """Its process is ending, and the next process will listen at the same address."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        address = Address("127.0.0.1", listener.getsockname()[1])
        coming = pool.submit(connect, address, OURS, room="room", rank=0, size=2, timeout=60.0)
        first = Channel(listener.accept()[0])
        first.send(encode(Challenge(bytes(32))))
        next_of(first, Signed)
        first.close()
        host(listener).close()
        coming.result().close()


def test_an_address_that_closes_every_connection_is_another_program() -> None:
    def shut_down() -> None:
        with suppress(OSError):
            while True:
                listener.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(shut_down)
        with pytest.raises(ConfigError, match="closes every connection: is another program there"):
            connect(Address("127.0.0.1", listener.getsockname()[1]), OURS, timeout=0.5)
        listener.shutdown(socket.SHUT_RDWR)


def test_an_address_that_answers_in_another_protocol_is_another_program() -> None:
    def answer(listener: socket.socket) -> None:
        with listener.accept()[0] as client:
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        answered = pool.submit(answer, listener)
        with pytest.raises(ConfigError, match="uses another protocol: is another program there"):
            connect(Address("127.0.0.1", listener.getsockname()[1]), OURS, timeout=600.0)
        answered.result()


@pytest.mark.slow
def test_an_address_that_never_answers_is_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connecting_module, "SILENT_TIMEOUT_S", 0.0)
    monkeypatch.setattr(connecting_module, "ANSWER_S", 0.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ConfigError, match="did not answer in time: is another program there"),
    ):
        connect(Address("127.0.0.1", listener.getsockname()[1]), OURS, timeout=600.0)


def test_the_error_names_missing_members(meeting: Rendezvous) -> None:
    with pytest.raises(ConfigError, match=r"within 1 s: ranks 0, 2 missing, arrived: rank 1 \("):
        join(meeting, 1, 3, timeout=1.0)


def test_missing_members_are_logged_during_the_wait(
    meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(members_module, "REPORT_S", 0.2)
    with caplog.at_level(logging.INFO, "shoal"), pytest.raises(ConfigError, match="rank 0 missing"):
        join(meeting, 1, timeout=1.0)
    assert any("rank 0 missing" in record.message for record in caplog.records)


def test_a_rank_given_twice_is_refused(meeting: Rendezvous) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(join, meeting, 0)
        arrive(meeting)
        with pytest.raises(ConfigError, match=r"rank 0 may not join .*: rank 0 \(.* has already joined"):
            join(meeting, 0)
        join(meeting, 1).close()
        first.result().close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "another"}, "the shared key differs"),
        ({"size": 3}, "it expects 3 ranks, rank 0 .* expects 2"),
        ({"agreement": {"dtype": "float32"}}, "its dtype is float32, that of rank 0 .* is bfloat16"),
        ({"agreement": {}}, "its dtype is nothing, that of rank 0 .* is bfloat16"),
        ({"rank": 7}, "rank 7 of 2 does not exist"),
    ],
)
def test_a_process_that_differs_is_refused_with_the_difference(
    meeting: Rendezvous, options: dict[str, Any], message: str
) -> None:
    agreement = {"dtype": "bfloat16"}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(join, meeting, 0, agreement=agreement)
        arrive(meeting)
        with pytest.raises(ConfigError, match=message):
            join(meeting, **{"rank": 1, "agreement": agreement, **options})
        join(meeting, 1, agreement=agreement).close()
        first.result().close()


def test_a_member_that_is_restarted_alone_is_refused(meeting: Rendezvous) -> None:
    first, second = both(meeting)
    second.close("rank 1 was killed")
    until(first, lambda: bool(first.failures()))
    with pytest.raises(
        ConfigError,
        match=r"^rank 1 may not join at .*: the others have gone on without rank 1: restart all of them$",
    ):
        join(meeting, 1)
    first.close()


def test_posts_reach_one_or_all_others(meeting: Rendezvous) -> None:
    found = together([lambda rank=rank: join(meeting, rank, 3) for rank in range(3)])  # type: ignore[misc]
    found[1].post("step", b"5")
    found[2].post("step", b"6", to=0)
    until(found[0], lambda: found[0].latest("step") == {1: b"5", 2: b"6"})
    until(found[2], lambda: found[2].latest("step") == {1: b"5"})
    assert found[1].latest("step") == {}
    for each in found:
        each.close()


def host(listener: socket.socket) -> Channel:
    """Play a rendezvous with one connection, at which rank 0 of 2 joins."""
    channel = Channel(listener.accept()[0])
    channel.send(encode(Challenge(bytes(32))))
    signed = next_of(channel, Signed)
    channel.send(encode(Welcome(proof(KEY, "rendezvous", hello_decoder.decode(signed.hello).nonce, signed.hello))))
    channel.send(encode(RoomComplete(("rank 0", "rank 1"))))
    return channel


def next_of(channel: Channel, kind: type) -> Any:
    while True:
        assert channel.has_frame or wait([channel], 60), f"no {kind.__name__} comes"
        for frame in channel.receive(1):
            message = to_rendezvous.decode(frame)
            if isinstance(message, kind):
                return message


@contextmanager
def member_by_hand() -> Iterator[tuple[RoomMember, Channel]]:
    """Return a member, and the other end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        address = Address("127.0.0.1", listener.getsockname()[1])
        joined = pool.submit(RoomMember, address, OURS, room="room", rank=0, size=2, timeout=60.0)
        with closing(host(listener)) as channel:
            member = joined.result()
            yield member, channel
            channel.shut_down()
            member.close()


@pytest.fixture
def by_hand() -> Iterator[tuple[RoomMember, Channel]]:
    with member_by_hand() as found:
        yield found


@pytest.fixture
def fast_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(members_module, "HEARTBEAT_TIMEOUT_S", 2.0)


POSTED = encode(RoomMessage("step", 1, -1, b"5"))


@pytest.mark.usefixtures("fast_heartbeats")
def test_an_incomplete_frame_is_waited_for(
    by_hand: tuple[RoomMember, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    member, channel = by_hand
    read = 0
    receive = Channel.receive

    def counted(self: Channel, max_frames: int | None = None) -> list[bytes]:
        nonlocal read
        read += self is not channel
        return receive(self, max_frames)

    monkeypatch.setattr(Channel, "receive", counted)
    whole = struct.pack("<I", len(POSTED)) + POSTED
    os.write(channel.fileno(), whole[:7])
    for _ in range(5):
        next_of(channel, Alive)
    assert read < 10
    os.write(channel.fileno(), whole[7:])
    until(member, lambda: member.latest("step") == {1: b"5"})


@pytest.mark.slow
@pytest.mark.usefixtures("fast_heartbeats")
def test_a_slowly_sent_frame_keeps_the_connection_alive(by_hand: tuple[RoomMember, Channel]) -> None:
    member, channel = by_hand
    post = encode(RoomMessage("step", 1, -1, bytes(100)))
    whole = struct.pack("<I", len(post)) + post
    for i in range(30):
        next_of(channel, Alive)
        os.write(channel.fileno(), whole[i : i + 1])
    os.write(channel.fileno(), whole[30:])
    until(member, lambda: bool(member.failures() or member.latest("step")))
    assert member.failures() == {}


def test_the_reason_for_a_removal_is_kept_after_the_end_of_the_connection(by_hand: tuple[RoomMember, Channel]) -> None:
    member, channel = by_hand
    channel.send(encode(JoinRefused("it can't be done")))
    channel.shut_down()
    for thread in threads_of(member):
        thread.join(60)
    (why,) = member.failures().values()
    assert re.fullmatch(r"the rendezvous at 127\.0\.0\.1:\d+ removed rank 0: it can't be done", why)


def test_leaving_a_rendezvous_that_does_not_listen(by_hand: tuple[RoomMember, Channel]) -> None:
    """No thread is left that would use the closed channel."""
    member, _ = by_hand
    (thread,) = threads_of(member)
    member.close(patience=0.1)
    assert not thread.is_alive()


def threads_of(member: RoomMember) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"shoal-member-{member.rank}"]


def test_a_refused_member_leaves_no_descriptor_open(meeting: Rendezvous) -> None:
    def eventfds() -> int:
        links = Path("/proc/self/fd").iterdir()
        return sum("eventfd" in os.readlink(link) for link in links if link.is_symlink())

    before = eventfds()
    with pytest.raises(ConfigError, match="the shared key"):
        join(meeting, 0, key="another")
    assert eventfds() == before


def test_a_process_may_have_many_files_open() -> None:
    with many_open_files(), member_by_hand() as (member, channel):
        channel.send(POSTED)
        channel.send(POSTED)
        until(member, lambda: bool(member.latest("step")))
        member.clear()
        member.clear()


def arrive(meeting: Rendezvous) -> None:
    """Join as the first member, which sets the agreement of the room."""
    for _ in range(6000):
        if meeting.rooms:
            return
        threading.Event().wait(0.01)
    raise AssertionError("nobody has arrived")


def until(member: RoomMember, true: Callable[[], bool]) -> None:
    deadline = threading.Event()
    for _ in range(600):
        if true():
            return
        deadline.wait(0.1)
    raise AssertionError(f"rank {member.rank} did not hear of it")


@pytest.mark.parametrize("size", [2**10, 2**24])
def test_results_are_collected_in_order(meeting: Rendezvous, size: int) -> None:
    found = both(meeting)
    with ThreadPoolExecutor(2) as pool:
        all_of_it = list(pool.map(lambda each: each.collect("out", bytes([each.rank]) * size, timeout=60), found))
    assert all_of_it == [[b"\0" * size, b"\1" * size], None]
    for each in found:
        each.close()


def test_collecting_names_missing_members(meeting: Rendezvous) -> None:
    found = both(meeting)
    with pytest.raises(EngineError, match=r"not all have come within 0.3 s; missing: rank 1 with prompts 3 to 5"):
        found[0].collect("out", b"", timeout=0.3, describe=lambda rank: f"rank {rank} with prompts 3 to 5")
    found[1].close("rank 1 ran out of memory")
    with pytest.raises(EngineError, match="ran out of memory; missing: rank 1"):
        found[0].collect("out", b"", timeout=60)
    found[0].close()


def test_a_member_that_leaves_after_its_work_is_no_failure(meeting: Rendezvous) -> None:
    first, second = both(meeting)
    second.close()
    with pytest.raises(EngineError, match="rank 1 ended without it"):
        first.collect("out", b"", timeout=60)
    assert first.failures() == {}
    first.close()


MEMBER = """
import sys, time
from shoal.addresses import Address
from shoal.transport.room_member import RoomMember
from shoal.wire.credentials import Credentials
RoomMember(Address.parse(sys.argv[1]), Credentials("a key"), room="room", rank=1, size=2, timeout=60.0)
print("in", flush=True)
time.sleep(600)
"""


def test_a_killed_member_is_named(meeting: Rendezvous) -> None:
    child = subprocess.Popen([sys.executable, "-c", MEMBER, meeting.address], stdout=subprocess.PIPE)
    first = join(meeting, 0)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    until(first, lambda: bool(first.failures()))
    assert f"rank 1 ({socket.gethostname()}, process {child.pid}) ended, or lost its connection" in first.failures()[1]
    first.close()


def test_a_rendezvous_that_ends_is_noticed(meeting: Rendezvous) -> None:
    found = both(meeting)
    meeting.close()
    for each in found:
        until(each, lambda each=each: -1 in each.failures())  # type: ignore[misc]
        each.close()


def test_unauthenticated_connections_change_nothing(meeting: Rendezvous) -> None:
    """They send random bytes, an endless frame, and a message that only members may send."""
    address = Address.parse(meeting.address)
    for noise in (os.urandom(4096), (2**31).to_bytes(4, "little") + bytes(10000), b""):
        with socket.create_connection((address.host, address.port)) as stranger:
            stranger.sendall(noise)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    with socket.create_connection((address.host, address.port)) as stranger:
        channel = Channel(stranger.dup())
        channel.send(encode(StoreSet("a", b"b")))
        channel.flush(10)
        stranger.settimeout(30)
        while stranger.recv(4096):
            pass
        channel.close()
    asking = connect(address, OURS, timeout=60.0)
    asking.send(encode(StoreGet(("a",), wait=False)))
    assert wait([asking], 60)
    assert [from_rendezvous.decode(frame) for frame in asking.receive()] == [StoreValue(None)]
    asking.close()
    for each in both(meeting):
        each.close()


def test_silent_connections_do_not_keep_members_out() -> None:
    with Rendezvous(credentials=OURS, max_unauthenticated=4, hello_s=600.0) as meeting:
        address = Address.parse(meeting.address)
        strangers = [socket.create_connection((address.host, address.port), timeout=60) for _ in range(4)]
        knock = encode(Knock())
        for stranger in strangers:
            stranger.sendall(struct.pack("<I", len(knock)) + knock)
            assert stranger.recv(4)  # it was accepted
        connect(address, OURS, timeout=1.0).close()
        while strangers[0].recv(4096):
            pass
        for each in both(meeting):
            each.close()
    for stranger in strangers:
        stranger.close()


def test_messages_after_a_refusal_are_ignored(meeting: Rendezvous) -> None:
    address = Address.parse(meeting.address)
    with closing(Channel(socket.create_connection((address.host, address.port)))) as channel:
        channel.send(encode(Knock()))
        assert wait([channel], 60)
        (challenge,) = (from_rendezvous.decode(frame) for frame in channel.receive())
        assert isinstance(challenge, Challenge)
        hello = encode(Hello("room", 0, 1, "host", 1, bytes(32), {}))
        signed = [encode(Signed(hello, proof(key, "member", challenge.nonce, hello))) for key in ("no", KEY)]
        os.write(channel.fileno(), b"".join(struct.pack("<I", len(each)) + each for each in signed))
        with suppress(ChannelClosed):
            while wait([channel], 60):
                channel.receive()
    meeting.close()
    assert not meeting.rooms


def test_without_file_descriptors_the_next_connection_is_waited_for(
    meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = list[float]()
    accept = socket.socket.accept

    def accept_the_third_time(listener: socket.socket) -> Any:
        called.append(time.monotonic())
        if len(called) < 3:
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_the_third_time)
    connect(Address.parse(meeting.address), OURS, timeout=60.0).close()
    assert len(called) == 3
    assert all(later - sooner >= 0.4 for sooner, later in pairwise(called))


def test_keepalive_is_enabled_on_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP notices an unreachable host: the connection of a store has no heartbeats of its own."""
    watched = list[socket.socket]()
    for module in (connecting_module, rendezvous_module):
        monkeypatch.setattr(module, "enable_keepalive", watched.append)
    with Rendezvous(credentials=OURS) as meeting, closing(connect(Address.parse(meeting.address), OURS, timeout=60.0)):
        assert len({sock.fileno() for sock in watched}) == 2
    with socket.socket() as sock:
        enable_keepalive(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, interval, count, unanswered_ms = (
            sock.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        )
    assert idle + interval * count == unanswered_ms / 1000 == 8


def test_an_address_that_other_hosts_can_reach_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="set SHOAL_CLUSTER_KEY"):
        require_key("", "192.0.2.1")
    require_key("", "127.0.0.1")
    require_key("key", "192.0.2.1")


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:0", "host:65536", "host:x"])
def test_invalid_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Address.parse(text)
