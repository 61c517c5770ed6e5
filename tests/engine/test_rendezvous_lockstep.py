"""Lockstep between engine processes, which meet at a rendezvous."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from shoal.engine.lockstep.rendezvous import RendezvousLockstep
from shoal.errors import ConfigError, EngineError, RanksDied
from shoal.transport.channel import wait
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import replace_fields
from shoal.wire.credentials import Credentials
from shoal.wire.plan import ReplicaPlace

pytestmark = pytest.mark.slow

SIZE = 3


def place(meeting: Rendezvous, rank: int) -> ReplicaPlace:
    return ReplicaPlace(rank, SIZE, rendezvous=meeting.address, credentials=Credentials("key"))


@pytest.fixture
def replicas() -> Iterator[list[RendezvousLockstep]]:
    with Rendezvous(credentials=Credentials("key")) as meeting, ThreadPoolExecutor(SIZE) as pool:
        found = list(pool.map(lambda rank: RendezvousLockstep(place(meeting, rank), {}, timeout=60), range(SIZE)))
        yield found
        for each in found:
            each.close()


def refusals(meeting: Rendezvous, at: list[str]) -> set[str]:
    """Return the errors of two replicas that join the rendezvous, each at an address of its own."""

    def join(rank: int) -> str:
        there = ReplicaPlace(rank, 2, rendezvous=at[rank], credentials=Credentials("key"))
        with pytest.raises(ConfigError) as found:
            RendezvousLockstep(there, {}, timeout=60)
        return str(found.value)

    with ThreadPoolExecutor(2) as pool:
        return set(pool.map(join, range(2)))


def test_replicas_over_ipv4_and_over_ipv6_are_refused() -> None:
    with Rendezvous("::", credentials=Credentials("key")) as meeting:
        port = meeting.address.rpartition(":")[2]
        (why,) = refusals(meeting, [f"127.0.0.1:{port}", f"[::1]:{port}"])
    assert "some over IPv6 (replica 0: 127.0.0.1, replica 1: ::1)" in why
    assert "give all replicas the same IP address" in why


@pytest.mark.parametrize(
    ("known", "says"),
    [
        (["127.0.0.1", "10.0.0.2"], "replica 0 has joined the rendezvous from 127.0.0.1, a loopback address"),
        (["fd02::1", "fe80::1%eth0"], "replica 1 has joined the rendezvous from fe80::1%eth0, a link-local address"),
    ],
)
def test_an_address_that_other_hosts_cannot_reach_is_refused(
    monkeypatch: pytest.MonkeyPatch, known: list[str], says: str
) -> None:
    monkeypatch.setattr(RendezvousLockstep, "host_address", property(lambda replica: known[replica.rank]))
    with Rendezvous(credentials=Credentials("key")) as meeting:
        (why,) = refusals(meeting, [meeting.address] * 2)
    assert says in why


def await_due(replica: RendezvousLockstep, count: int) -> None:
    for _ in range(600):
        if replica.steps_due() == count:
            return
        assert wait([replica], 60)  # type: ignore[list-item]
        replica.clear()
    raise AssertionError(f"steps_due() stays at {replica.steps_due()}, not {count}")


def test_all_must_launch_as_many_steps_as_the_furthest(replicas: list[RendezvousLockstep]) -> None:
    assert [each.steps_due() for each in replicas] == [0, 0, 0]
    replicas[1].launched(1)
    replicas[2].launched(3)
    for rank, due in enumerate([3, 3, 3]):
        await_due(replicas[rank], due)


def test_a_launched_step_wakes_a_replica_that_waits(replicas: list[RendezvousLockstep]) -> None:
    replicas[0].clear()
    assert not wait([replicas[0]], 0)  # type: ignore[list-item]
    timer = threading.Timer(0.05, lambda: replicas[1].launched(7))
    timer.start()
    await_due(replicas[0], 7)
    timer.join()


def test_the_others_are_told_which_replica_has_failed(replicas: list[RendezvousLockstep]) -> None:
    replicas[2].close("out of memory")
    for each in replicas[:2]:
        with pytest.raises(EngineError, match=r"another replica has failed.*replica 2 \(.*\) out of memory"):
            await_due(each, 1)


def await_end(replica: RendezvousLockstep, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        await_due(replica, -1)


def test_a_replica_that_leaves_early_fails_those_that_have_work(replicas: list[RendezvousLockstep]) -> None:
    for each in replicas:
        each.launched(1)
    for each in replicas:
        await_due(each, 1)
    replicas[2].close()
    while 2 not in replicas[0].gone() or 2 not in replicas[1].gone():
        assert wait([replicas[0], replicas[1]], 60)  # type: ignore[list-item]
        for each in replicas[:2]:
            each.clear()
    assert [each.steps_due() for each in replicas[:2]] == [1, 1], "the others rest, so they do not need it"
    replicas[0].launched(2)
    await_end(replicas[0], r"^replica 2 \(.*\) ended while this replica has work$")
    await_end(replicas[1], r"^replica 2 \(.*\) ended while another replica has work$")


def reform_elsewhere(replica: RendezvousLockstep) -> str:
    """Wait until a replica hears of a reform, and return the reason."""
    for _ in range(600):
        try:
            replica.check()
        except RanksDied as error:
            return str(error)
        assert wait([replica], 60)  # type: ignore[list-item]
        replica.clear()
    raise AssertionError("it hears of no reform")


def await_formed(replica: RendezvousLockstep) -> None:
    while not replica.formed():
        assert wait([replica], 60)  # type: ignore[list-item]
        replica.clear()


def test_all_follow_the_replica_whose_ranks_have_died(replicas: list[RendezvousLockstep]) -> None:
    (first,) = {each.incarnation for each in replicas}
    replicas[0].launched(3)
    assert replicas[2].begin_reform("rank 4 was killed", awake=False) == first + 1
    for each in replicas[:2]:
        assert reform_elsewhere(each) == "replica 2, which shares experts with this one: rank 4 was killed"
        assert each.begin_reform("", awake=True) == first + 1
    assert not replicas[0].formed()
    with ThreadPoolExecutor(SIZE) as pool:
        list(pool.map(await_formed, replicas))
    assert not any(each.all_awake for each in replicas)
    replicas[1].launched(1)
    await_due(replicas[0], 1)


def test_a_replica_that_leaves_before_a_reform_fails_those_that_need_it(replicas: list[RendezvousLockstep]) -> None:
    replicas[2].close()
    replicas[0].begin_reform("rank 4 was killed", awake=True)
    await_end(replicas[0], r"^replica 2 \(.*\) ended while this replica has work$")
    await_end(replicas[1], r"^replica 2 \(.*\) ended while another replica has work$")


def test_engines_made_one_after_the_other_meet_in_rooms_of_their_own() -> None:
    with Rendezvous(credentials=Credentials("key")) as meeting, ThreadPoolExecutor(SIZE) as pool, ExitStack() as stack:
        for number in range(2):  # the first engines are still in their room
            places = [replace_fields(place(meeting, rank), meeting=number) for rank in range(SIZE)]
            found = list(pool.map(lambda each: RendezvousLockstep(each, {}, timeout=60), places))
            for each in found:
                stack.callback(each.close)
            assert [each.steps_due() for each in found] == [0] * SIZE
        assert len(meeting.rooms) == 2


@pytest.mark.slow
def test_replicas_that_differ_are_refused() -> None:
    with Rendezvous(credentials=Credentials("key")) as meeting, ThreadPoolExecutor(1) as pool:
        first = pool.submit(RendezvousLockstep, place(meeting, 0), {"dtype": "float32"}, timeout=5)
        for _ in range(6000):
            if meeting.rooms:
                break
            threading.Event().wait(0.01)
        with pytest.raises(ConfigError, match="its dtype is bfloat16"):
            RendezvousLockstep(place(meeting, 1), {"dtype": "bfloat16"}, timeout=5)
        with pytest.raises(ConfigError, match="ranks 1, 2 missing"):
            first.result()


def test_a_returning_replica_that_waits_too_long_has_no_wrong_options() -> None:
    with Rendezvous(credentials=Credentials("key")) as meeting, pytest.raises(EngineError, match="ranks 0, 2 missing"):
        RendezvousLockstep(replace_fields(place(meeting, 1), returning=True), {}, timeout=1)
