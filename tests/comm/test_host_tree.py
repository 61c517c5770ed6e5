"""Tests of groups that span hosts, of which at least one has several ranks. The hosts are made up."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.comm import formation
from shoal.comm.process_comm import ProcessComm
from shoal.comm.shared_memory import SharedMemory
from shoal.comm.shared_memory_library import load_library
from shoal.comm.torch_distributed import c10d
from shoal.errors import CommAborted, CommTimeout
from support.fakes import on_threads

pytestmark = pytest.mark.skipif(load_library()[0] is None, reason=load_library()[1])
HOSTS = ["aabb", "aab", "abb", "abab", "aabcc"]  # of the ranks in order

Connect = Callable[..., list[ProcessComm]]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Return a function that connects ranks which believe to be on the given hosts."""
    here = threading.local()
    monkeypatch.setattr(formation, "host_identity", lambda: here.name)

    def run(hosts: str, timeout_s: float = 60.0) -> list[ProcessComm]:
        store, size, device = c10d.HashStore(), len(hosts), torch.device("cpu")

        def one(rank: int) -> ProcessComm:
            here.name = hosts[rank]
            return ProcessComm(store, "g", rank, size, timeout_s=timeout_s, device=device)

        return on_threads(size, one)

    return run


@pytest.mark.parametrize("hosts", HOSTS)
def test_sums_are_the_same_on_all_ranks(connect: Connect, hosts: str) -> None:
    comms, size = connect(hosts), len(hosts)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 5, 20_001):
        parts = torch.randn(size, count, generator=generator)
        found = on_threads(size, lambda rank: comms[rank].all_reduce(parts[rank].clone()))  # noqa: B023
        assert all(torch.equal(each, found[0]) for each in found)
        # Sums of at most five numbers of about one: the order of the sum changes a few units in the last place.
        torch.testing.assert_close(found[0], parts.sum(0), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("hosts", ["aab", "abab"])
def test_sums_that_are_begun_before_others_have_ended(connect: Connect, hosts: str) -> None:
    comms, size = connect(hosts), len(hosts)
    parts = torch.randn(3, size, 400, generator=torch.Generator().manual_seed(0))

    def run(rank: int) -> tuple[list[Tensor], list[Tensor]]:
        assert comms[rank].overlaps
        in_turn = [comms[rank].all_reduce(part[rank].clone()) for part in parts]
        begun = [comms[rank].begin_all_reduce(part[rank].clone()) for part in parts]
        return in_turn, [each.wait() for each in begun]

    for in_turn, begun in on_threads(size, run):
        assert all(map(torch.equal, in_turn, begun))
    assert comms[0].progress.read_total("all_reduce").count == 6


@pytest.mark.parametrize("hosts", ["aab", "abab"])
def test_other_operations_reach_all_ranks(connect: Connect, hosts: str) -> None:
    comms, size = connect(hosts), len(hosts)

    def run(rank: int) -> list[Tensor]:
        comm, x = comms[rank], torch.full((size, 2), float(rank))
        comm.barrier()
        pending = comm.send(x[:1], (rank + 1) % size)
        received = comm.recv(torch.empty(1, 2), (rank - 1) % size)
        pending.wait()
        ones = [1] * size
        return [
            received,
            comm.all_gather(x[:1], ones),
            comm.reduce_scatter(x, ones),
            comm.all_to_all(x, ones, ones),
            comm.broadcast(x[:1], size - 1),
        ]

    by_rank = torch.arange(float(size)).unsqueeze(1).expand(size, 2)
    for rank, (received, gathered, summed, exchanged, sent) in enumerate(on_threads(size, run)):
        assert received.unique().tolist() == [(rank - 1) % size]
        assert torch.equal(gathered, by_rank)
        assert summed.unique().tolist() == [size * (size - 1) / 2]
        assert torch.equal(exchanged, by_rank)
        assert sent.unique().tolist() == [size - 1]


def test_its_description_and_its_counts(connect: Connect) -> None:
    comms = connect("aab")
    assert comms[0].backend == "shm and gloo (3 ranks on 2 hosts: sums are formed on each host first)"
    on_threads(3, lambda rank: comms[rank].all_reduce(torch.ones(3)))
    assert {name: total.count for name, total in comms[0].progress.read_totals().items()} == {"all_reduce": 1}
    assert str(comms[0].progress) == "after operation #1"


def test_a_host_without_shared_memory_sums_over_gloo(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> SharedMemory:
        raise PermissionError("not here")

    monkeypatch.setattr(SharedMemory, "open", refuse)
    comms = connect("aab")
    assert on_threads(3, lambda rank: comms[rank].all_reduce(torch.ones(1)).item()) == [3.0] * 3


def test_a_rank_that_is_missing_on_another_host_ends_the_wait(connect: Connect) -> None:
    comms = connect("aab", timeout_s=0.5)

    def run(rank: int) -> None:
        with pytest.raises(CommTimeout, match=rf"rank {rank} of 3: all_reduce #1: .* waited 0\.5 s"):
            comms[rank].all_reduce(torch.ones(1))

    on_threads(2, run)


def test_an_abort_ends_operations_on_all_hosts(connect: Connect) -> None:
    comms = connect("aabb")

    def run(rank: int) -> None:
        if rank == 3:
            comms[rank].abort()
        with pytest.raises(CommAborted):
            comms[rank].all_reduce(torch.ones(1))

    on_threads(4, run)


def test_operations_of_the_whole_group_are_counted_and_timed(connect: Connect) -> None:
    comms = connect("aab")
    on_threads(3, lambda rank: comms[rank].all_reduce(torch.ones(3)))
    on_threads(3, lambda rank: comms[rank].broadcast(torch.ones(3), 0))
    for comm in comms:
        totals = comm.progress.read_totals()
        assert {name: total.count for name, total in totals.items()} == {"all_reduce": 1, "broadcast": 1}
        assert all((total.ns or 0) > 0 and total.waited_ns is None for total in totals.values())
