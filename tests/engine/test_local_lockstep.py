"""Engines on threads that launch the same number of steps."""

import select
import threading

import pytest

from shoal.engine.lockstep.local import LocalLockstep
from shoal.errors import EngineError, RanksDied
from support.descriptors import many_open_files


def readable(lockstep: LocalLockstep) -> bool:
    return bool(select.select([lockstep], [], [], 0)[0])


def test_all_must_launch_as_many_steps_as_the_furthest() -> None:
    a, b, c = LocalLockstep.make_all(3)
    assert a.steps_due() == 0
    a.launched(1)
    a.launched(2)
    b.launched(1)  # it follows
    assert [each.steps_due() for each in (a, b, c)] == [2, 2, 2]
    b.launched(3)
    assert [each.steps_due() for each in (a, b, c)] == [3, 3, 3]
    for each in (a, b, c):
        each.close()


def test_a_replica_that_is_behind_is_woken_until_it_clears_the_signal() -> None:
    a, b = LocalLockstep.make_all(2)
    a.launched(1)
    assert readable(b)
    assert not readable(a)
    b.clear()
    b.clear()
    assert not readable(b)
    b.launched(1)
    assert not readable(a), "it has launched that step already"
    a.close()
    b.launched(2)
    b.close()
    b.close()


def test_a_process_may_have_many_files_open() -> None:
    with many_open_files():
        a, b = LocalLockstep.make_all(2)
    poller = select.poll()
    poller.register(b.fileno(), select.POLLIN)
    a.launched(1)
    assert poller.poll(0)
    b.clear()
    b.clear()
    assert not poller.poll(0)
    for each in (a, b):
        each.close()


def test_the_others_are_told_of_the_first_failure() -> None:
    a, b, c = LocalLockstep.make_all(3)
    a.close("replica 0: out of memory")
    b.close("replica 1: lost contact")
    assert readable(c)
    with pytest.raises(EngineError, match=r"^replica 0: out of memory$"):
        c.steps_due()
    c.close()


def test_a_replica_that_leaves_after_its_work_ends_no_other() -> None:
    a, b = LocalLockstep.make_all(2)
    a.launched(4)
    a.close()
    assert b.steps_due() == 4
    b.close()


def test_a_reform_that_one_replica_begins_is_begun_by_all() -> None:
    a, b, c = LocalLockstep.make_all(3)
    first = a.incarnation
    a.launched(7)
    for each in (a, b, c):
        each.check()
    assert b.begin_reform("rank 3 was killed", awake=True) == first + 1
    assert readable(a)
    assert (b.steps_due(), a.steps_due()) == (0, 7), "steps of the incarnation before do not count"
    for each in (a, c):
        with pytest.raises(RanksDied, match=r"^replica 1, which shares .* with this one: rank 3 was killed$") as found:
            each.check()
        assert found.value.ranks == ()
    assert a.begin_reform("", awake=True) == first + 1
    assert not a.formed(), "the others are not ready"
    assert not b.formed()
    assert c.begin_reform("rank 4 was stopped", awake=False) == first + 1, "both ranks are replaced together"
    assert c.formed()
    assert a.formed()
    assert b.formed()
    for each in (a, b, c):
        each.check()
        assert not each.all_awake
        each.close()


def test_a_reform_that_is_interrupted_begins_again() -> None:
    a, b = LocalLockstep.make_all(2)
    first = a.begin_reform("rank 0 was killed", awake=True)
    assert b.begin_reform("", awake=True) == first
    assert b.formed() is False
    assert b.begin_reform("rank 0 was killed", awake=True) == first + 1
    assert not b.formed(), "the other replica is in the reform before"
    with pytest.raises(RanksDied):
        a.check()
    assert a.begin_reform("", awake=True) == first + 1
    assert a.formed()
    assert a.all_awake
    a.close()
    b.close()


def test_idle_replicas_follow_busy_ones_and_all_rest_at_the_same_step() -> None:
    members = LocalLockstep.make_all(4)
    work = [0, 30, 0, 7]
    ready = threading.Barrier(len(members), timeout=60)
    counts = [0] * len(members)

    def run(number: int) -> None:
        mine = members[number]
        ready.wait()
        while True:
            while counts[number] < max(mine.steps_due(), work[number]):
                counts[number] += 1
                mine.launched(counts[number])
            if counts[number] == max(work):
                return
            assert select.select([mine], [], [], 60)[0], "no other replica wakes it"
            mine.clear()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == [30] * 4
    for member in members:
        member.close()
