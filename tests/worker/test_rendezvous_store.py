"""The store of a rendezvous has the operations that torch.distributed needs, and connects a real group."""

import datetime
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from shoal.comm.torch_distributed import TorchComm
from shoal.errors import CommError, CommTimeout, ConfigError
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.credentials import Credentials
from shoal.worker.rendezvous_store import RendezvousStore


@pytest.fixture
def meeting() -> Iterator[Rendezvous]:
    with Rendezvous(credentials=Credentials("key")) as found:
        yield found


@pytest.fixture
def store(meeting: Rendezvous) -> Iterator[RendezvousStore]:
    with closing(RendezvousStore(meeting.address, Credentials("key"), timeout_s=60)) as found:
        yield found


def test_values_are_set_added_compared_and_deleted(store: RendezvousStore) -> None:
    assert not store.check(["a"])
    store.set("a", "1")
    assert store.get("a") == b"1"
    assert store.add("a", 41) == 42
    assert store.add("new", 3) == 3
    assert store.check(["a", "new"])
    assert not store.check(["a", "other"])
    assert store.compare_set("a", b"42", b"x") == b"x"
    assert store.compare_set("a", b"42", b"y") == b"x"
    assert store.delete_key("a")
    assert not store.delete_key("a")


def test_get_and_wait_return_when_the_key_is_set(meeting: Rendezvous, store: RendezvousStore) -> None:
    with (
        closing(RendezvousStore(meeting.address, Credentials("key"), timeout_s=60)) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(other.get, "late")
        store.set("late", b"\0\xff")
        assert waiting.result() == b"\0\xff"
    with pytest.raises(CommTimeout, match=r"no answer to StoreGet.*never.* in 0.2 s"):
        store.wait(["never"], datetime.timedelta(seconds=0.2))


def test_an_invalid_request_ends_only_its_own_connection(
    meeting: Rendezvous, store: RendezvousStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.set("a", "x")
    with pytest.raises(CommError, match="can't add a number to a, which is b'x'"):
        store.add("a", 1)
    assert "failed to answer rank 0 (" in caplog.text
    with closing(RendezvousStore(meeting.address, Credentials("key"), timeout_s=60)) as other:
        assert other.get("a") == b"x"


def test_a_wrong_shared_key_is_refused(meeting: Rendezvous) -> None:
    with pytest.raises(ConfigError, match="the shared key differs"):
        RendezvousStore(meeting.address, Credentials("guess"), timeout_s=60)


def test_gloo_groups_connect_through_the_store(meeting: Rendezvous) -> None:
    def run(rank: int) -> list[float]:
        with closing(RendezvousStore(meeting.address, Credentials("key"), timeout_s=60)) as store:
            comm = TorchComm(store, "tp:0", rank, 3, backend="gloo", timeout_s=60, device=torch.device("cpu"))
            found: list[float] = comm.all_reduce(torch.full((2,), float(rank + 1))).tolist()
            return found

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == [[6.0, 6.0]] * 3
