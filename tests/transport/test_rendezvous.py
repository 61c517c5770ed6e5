"""Meeting: any order of start, who is refused and why, what members hear of each other."""

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shoal import wire
from shoal.errors import ConfigError, EngineError
from shoal.transport import member as members_module
from shoal.transport.channel import Channel
from shoal.transport.member import Address, Member, connect
from shoal.transport.rendezvous import Rendezvous, require_key

KEY = "a key"


@pytest.fixture
def meeting() -> Iterator[Rendezvous]:
    with Rendezvous(key=KEY) as found:
        yield found


def join(meeting: Rendezvous, rank: int, size: int = 2, key: str = KEY, **options: Any) -> Member:
    settings = {"room": "room", "agreement": {}, "timeout": 60.0, **options}
    return Member(Address.parse(meeting.address), key, rank=rank, size=size, **settings)


def together(joins: list[Callable[[], Member]]) -> list[Member]:
    with ThreadPoolExecutor(len(joins)) as pool:
        return [future.result() for future in [pool.submit(one) for one in joins]]


def both(meeting: Rendezvous) -> list[Member]:
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
        early = pool.submit(connect, address, KEY, timeout=60.0)
        with Rendezvous(port=port, key=KEY):
            early.result().close()


def test_no_rendezvous_is_said_with_address_port_and_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"no answer from 127.0.0.1:{port} within 0.5 s \(.*refused\)"):
        connect(Address("127.0.0.1", port), KEY, timeout=0.5)


def test_another_program_at_the_address_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = Address("127.0.0.1", probe.getsockname()[1])
        with pytest.raises(ConfigError, match="is another program there"):
            connect(address, KEY, timeout=0.5)


def test_who_is_missing_is_said(meeting: Rendezvous) -> None:
    with pytest.raises(ConfigError, match=r"within 1 s: ranks 0, 2 missing, arrived: rank 1 \("):
        join(meeting, 1, 3, timeout=1.0)


def test_who_is_missing_is_logged_while_waiting(
    meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(members_module, "SAY_S", 0.2)
    with caplog.at_level(logging.INFO, "shoal"), pytest.raises(ConfigError, match="rank 0 missing"):
        join(meeting, 1, timeout=1.0)
    assert any("rank 0 missing" in record.message for record in caplog.records)


def test_a_number_given_twice_is_refused(meeting: Rendezvous) -> None:
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(join, meeting, 0)
        arrive(meeting)
        with pytest.raises(ConfigError, match=r"rank 0 may not join .*: rank 0 \(.* is there already"):
            join(meeting, 0)
        join(meeting, 1).close()
        first.result().close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "another"}, "the shared key is another one"),
        ({"size": 3}, "it counts 3 ranks, rank 0 .* counts 2"),
        ({"agreement": {"dtype": "float32"}}, "its dtype is float32, that of rank 0 .* is bfloat16"),
        ({"agreement": {}}, "its dtype is nothing, that of rank 0 .* is bfloat16"),
        ({"rank": 7}, "rank 7 of 2 does not exist"),
    ],
)
def test_who_differs_is_refused_and_told_in_what(meeting: Rendezvous, options: dict[str, Any], message: str) -> None:
    agreement = {"dtype": "bfloat16"}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(join, meeting, 0, agreement=agreement)
        arrive(meeting)
        with pytest.raises(ConfigError, match=message):
            join(meeting, **{"rank": 1, "agreement": agreement, **options})
        join(meeting, 1, agreement=agreement).close()
        first.result().close()


def test_posts_reach_one_or_all_others(meeting: Rendezvous) -> None:
    found = together([lambda rank=rank: join(meeting, rank, 3) for rank in range(3)])  # type: ignore[misc]
    found[1].post("step", b"5")
    found[2].post("step", b"6", to=0)
    until(found[0], lambda: found[0].latest("step") == {1: b"5", 2: b"6"})
    until(found[2], lambda: found[2].latest("step") == {1: b"5"})
    assert found[1].latest("step") == {}
    for each in found:
        each.close()


def arrive(meeting: Rendezvous) -> None:
    """The first one sets what the room is."""
    for _ in range(6000):
        if meeting._rooms:
            return
        threading.Event().wait(0.01)
    raise AssertionError("nobody has arrived")


def until(member: Member, true: Callable[[], bool]) -> None:
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


def test_collecting_names_who_is_missing(meeting: Rendezvous) -> None:
    found = both(meeting)
    with pytest.raises(EngineError, match=r"not all have come within 0.3 s; missing: rank 1 with prompts 3 to 5"):
        found[0].collect("out", b"", timeout=0.3, describe=lambda rank: f"rank {rank} with prompts 3 to 5")
    found[1].close("rank 1 ran out of memory")
    with pytest.raises(EngineError, match="ran out of memory; missing: rank 1"):
        found[0].collect("out", b"", timeout=60)
    found[0].close()


def test_whoever_ends_well_is_no_failure(meeting: Rendezvous) -> None:
    first, second = both(meeting)
    second.close()
    with pytest.raises(EngineError, match="rank 1 ended without it"):
        first.collect("out", b"", timeout=60)
    assert first.failures() == {}
    first.close()


MEMBER = """
import sys, time
from shoal.transport.member import Address, Member
Member(Address.parse(sys.argv[1]), "a key", room="room", rank=1, size=2, timeout=60.0)
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


def test_strangers_change_nothing(meeting: Rendezvous) -> None:
    """Noise, a frame without end, a message that only members may send."""
    address = Address.parse(meeting.address)
    for noise in (os.urandom(4096), (2**31).to_bytes(4, "little") + bytes(10000), b""):
        with socket.create_connection((address.host, address.port)) as stranger:
            stranger.sendall(noise)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    with socket.create_connection((address.host, address.port)) as stranger:
        channel = Channel(stranger.dup())
        channel.send(wire.encode(wire.StoreSet("a", b"b")))
        channel.flush(10)
        stranger.settimeout(30)
        while stranger.recv(4096):
            pass
        channel.close()
    assert not meeting._store
    for each in both(meeting):
        each.close()


def test_an_address_that_others_reach_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="set SHOAL_CLUSTER_KEY"):
        require_key("", "192.0.2.1")
    require_key("", "127.0.0.1")
    require_key("key", "192.0.2.1")


@pytest.mark.parametrize("text", ["host", "host:", ":1", "host:0", "host:65536", "host:x"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Address.parse(text)
