"""Engines on threads that launch the same number of steps."""

import select
import threading

import pytest

from shoal.cluster.lockstep.local import LocalLockstep
from shoal.errors import EngineError
from support.descriptors import many_open_files


def readable(lockstep: LocalLockstep) -> bool:
    return bool(select.select([lockstep], [], [], 0)[0])


def test_all_are_due_what_the_furthest_has_launched() -> None:
    a, b, c = LocalLockstep.of(3)
    assert a.due() == 0
    a.launched(1)
    a.launched(2)
    b.launched(1)  # it follows
    assert [each.due() for each in (a, b, c)] == [2, 2, 2]
    b.launched(3)
    assert [each.due() for each in (a, b, c)] == [3, 3, 3]
    for each in (a, b, c):
        each.close()


def test_who_is_behind_is_woken_until_it_has_listened() -> None:
    a, b = LocalLockstep.of(2)
    a.launched(1)
    assert readable(b)
    assert not readable(a)
    b.quiet()
    b.quiet()
    assert not readable(b)
    b.launched(1)
    assert not readable(a), "it is there already"
    a.close()
    b.launched(2)
    b.close()
    b.close()


def test_a_process_may_have_many_files_open() -> None:
    with many_open_files():
        a, b = LocalLockstep.of(2)
    poller = select.poll()
    poller.register(b.fileno(), select.POLLIN)
    a.launched(1)
    assert poller.poll(0)
    b.quiet()
    b.quiet()
    assert not poller.poll(0)
    for each in (a, b):
        each.close()


def test_a_failure_reaches_the_others_and_the_first_one_counts() -> None:
    a, b, c = LocalLockstep.of(3)
    a.close("replica 0: out of memory")
    b.close("replica 1: lost contact")
    assert readable(c)
    with pytest.raises(EngineError, match=r"^replica 0: out of memory$"):
        c.due()
    c.close()


def test_whoever_ends_its_work_takes_nobody_along() -> None:
    a, b = LocalLockstep.of(2)
    a.launched(4)
    a.close()
    assert b.due() == 4
    b.close()


def test_idle_ones_follow_whoever_has_work_and_all_rest_at_the_same_step() -> None:
    places = LocalLockstep.of(4)
    work = [0, 30, 0, 7]
    ready = threading.Barrier(len(places), timeout=60)
    counts = [0] * len(places)

    def run(number: int) -> None:
        mine = places[number]
        ready.wait()
        while True:
            while counts[number] < max(mine.due(), work[number]):
                counts[number] += 1
                mine.launched(counts[number])
            if counts[number] == max(work):
                return
            assert select.select([mine], [], [], 60)[0], "nobody wakes it"
            mine.quiet()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == [30] * 4
    for place in places:
        place.close()
