"""The store in a file without a name, by which ranks of one host find each other."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from shoal.comm.shared_file_store import SharedFileStore
from shoal.errors import CommTimeout


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("store")
    yield fd
    os.close(fd)


def test_all_who_have_the_file_see_the_same(file: int) -> None:
    one, two = SharedFileStore(file, timeout_s=5), SharedFileStore(file, timeout_s=5)
    one.set("name", "value")
    assert two.get("name") == b"value"
    assert (two.add("number", 3), one.add("number", -1)) == (3, 2)
    assert one.compare_set("name", "other", "new") == b"value"
    assert one.compare_set("name", "value", "new") == b"new"
    assert two.get("name") == b"new"
    assert one.check(["name", "number"])
    assert two.delete_key("name")
    assert not two.delete_key("name")
    assert not one.check(["name"])


def test_a_wait_ends_with_the_value_or_with_an_error(file: int) -> None:
    one, two = SharedFileStore(file, timeout_s=20), SharedFileStore(file, timeout_s=20)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.get, "late")
        threading.Event().wait(0.01)
        two.set("late", b"\0")
        assert waiting.result(20) == b"\0"
    with pytest.raises(CommTimeout, match=r"no value of never after 0.01 s"):
        one.wait(["never"], timedelta(seconds=0.01))


@pytest.mark.parametrize("length", [1, 8, 11])
def test_half_a_record_of_a_process_that_has_died_disturbs_nobody(file: int, length: int) -> None:
    one, two = SharedFileStore(file, timeout_s=5), SharedFileStore(file, timeout_s=5)
    one.set("first", "1")
    start = os.fstat(file).st_size
    one.set("second", "2")
    os.ftruncate(file, start + length)
    assert not two.check(["second"])
    two.set("third", "3")
    newcomer = SharedFileStore(file, timeout_s=5)
    assert [newcomer.get(key) for key in ("first", "third")] == [b"1", b"3"]
    assert not newcomer.check(["second"])


def test_writers_do_not_lose_each_others_values(file: int) -> None:
    stores = [SharedFileStore(file, timeout_s=20) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda store: [store.add("count", 1) for _ in range(50)], stores))
    assert stores[0].add("count", 0) == 200
