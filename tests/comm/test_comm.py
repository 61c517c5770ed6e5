"""Tests of the contract that every communicator keeps, run with a group of each kind."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from shoal.comm.base import Communicator, OperationTotal
from shoal.comm.local import LocalComm
from shoal.comm.process_comm import ProcessComm
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.comm.torch_distributed import c10d
from shoal.errors import CommAborted, CommError, CommTimeout
from support.fakes import on_threads

T = TypeVar("T")
GROUPS = [("local", 1), ("threads", 2), ("threads", 3), ("gloo", 2), ("gloo", 3), ("shm", 2), ("shm", 3)]
OPERATIONS: dict[str, Callable[[Communicator], object]] = {
    "all_reduce": lambda comm: comm.all_reduce(torch.ones(2)),
    "all_gather": lambda comm: comm.all_gather(torch.ones(1), [1] * comm.size),
    "reduce_scatter": lambda comm: comm.reduce_scatter(torch.ones(comm.size), [1] * comm.size),
    "all_to_all": lambda comm: comm.all_to_all(torch.ones(comm.size), [1] * comm.size, [1] * comm.size),
    "broadcast": lambda comm: comm.broadcast(torch.ones(1), comm.size - 1),
    "barrier": lambda comm: comm.barrier(),
    "recv": lambda comm: comm.recv(torch.ones(1), (comm.rank + 1) % comm.size),
}


def connect(kind: Any, size: int, timeout_s: float, store: Any = None) -> list[Communicator]:
    if kind == "local":
        return [LocalComm()]
    if kind == "threads":
        group = ThreadGroup(size, timeout_s)
        return [ThreadComm(group, rank) for rank in range(size)]
    store, device = c10d.HashStore() if store is None else store, torch.device("cpu")
    return on_threads(
        size, lambda rank: ProcessComm(store, "g", rank, size, requested=kind, timeout_s=timeout_s, device=device)
    )


@pytest.fixture(scope="module", params=GROUPS, ids=lambda group: f"{group[0]}-{group[1]}")
def comms(request: pytest.FixtureRequest) -> list[Communicator]:
    kind, size = request.param
    return connect(kind, size, timeout_s=20)


@pytest.fixture(scope="module", autouse=True)
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def each(comms: Sequence[Communicator], work: Callable[[Communicator], T]) -> list[T]:
    return on_threads(len(comms), lambda rank: work(comms[rank]))


def part(rank: int, rows: int, columns: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a rank's input: different on each rank, the same at every call."""
    generator = torch.Generator().manual_seed(rank * 1000 + rows)
    return (torch.randn(rows, columns, generator=generator) * 10).to(dtype)


def same_everywhere(results: Sequence[Tensor]) -> Tensor:
    for result in results[1:]:
        assert torch.equal(result, results[0])
    return results[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", [5, 0])
def test_all_reduce_sums_to_the_same_bits(comms: list[Communicator], rows: int, dtype: torch.dtype) -> None:
    total = same_everywhere(each(comms, lambda comm: comm.all_reduce(part(comm.rank, rows, dtype=dtype))))
    exact = sum(part(rank, rows, dtype=dtype).double() for rank in range(len(comms)))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.int64: 0.0}[dtype]
    assert total.dtype == dtype
    torch.testing.assert_close(total.double(), exact, rtol=tolerance, atol=tolerance * 10)


def test_sums_that_are_begun_before_others_have_ended(comms: list[Communicator]) -> None:
    """They have the bits of sums that are formed one after the other, and are counted once each."""

    def run(comm: Communicator) -> tuple[list[Tensor], int]:
        before = comm.progress.read_total("all_reduce").count
        begun = [comm.begin_all_reduce(part(comm.rank, rows)) for rows in (5, 0, 700)]
        return [each.wait() for each in begun], comm.progress.read_total("all_reduce").count - before

    expected = each(comms, lambda comm: [comm.all_reduce(part(comm.rank, rows)) for rows in (5, 0, 700)])
    for (sums, count), sums_in_turn in zip(each(comms, run), expected, strict=True):
        assert all(map(torch.equal, sums, sums_in_turn))
        assert count == (0 if len(comms) == 1 else 3)


def test_all_reduce_takes_a_tensor_that_is_not_contiguous(comms: list[Communicator]) -> None:
    total = same_everywhere(each(comms, lambda comm: comm.all_reduce(part(comm.rank, 4).t())))
    exact = sum(part(rank, 4).t().double() for rank in range(len(comms)))
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 2), (0, 3, 0), (3, 0, 1), (0, 0, 0)])
def test_all_gather_puts_uneven_parts_side_by_side(comms: list[Communicator], sizes: Sequence[int], dim: int) -> None:
    sizes = sizes[: len(comms)]

    def mine(rank: int) -> Tensor:
        return part(rank, sizes[rank]).transpose(0, dim)

    gathered = same_everywhere(each(comms, lambda comm: comm.all_gather(mine(comm.rank), sizes, dim)))
    assert torch.equal(gathered, torch.cat([mine(rank) for rank in range(len(comms))], dim))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 1, 2), (0, 3, 0), (3, 0, 1)])
def test_reduce_scatter_gives_each_its_rows_of_the_sum(comms: list[Communicator], sizes: Sequence[int]) -> None:
    sizes = sizes[: len(comms)]
    shares = each(comms, lambda comm: comm.reduce_scatter(part(comm.rank, sum(sizes)), sizes))
    assert [len(share) for share in shares] == list(sizes)
    exact = sum(part(rank, sum(sizes)).double() for rank in range(len(comms)))
    torch.testing.assert_close(torch.cat(shares).double(), exact, rtol=1e-6, atol=1e-5)


def test_reduce_scatter_gives_a_row_the_same_bits_at_every_index(comms: list[Communicator]) -> None:
    """A row is summed in rank order, in float32 if its type is narrower."""
    size = len(comms)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 7):
            sizes = [rows + rank for rank in range(size)]
            columns = [part(rank, 1, 5, dtype).repeat(sum(sizes), 1) for rank in range(size)]
            shares = each(comms, partial(lambda x, s, comm: comm.reduce_scatter(x[comm.rank], s), columns, sizes))
            total = columns[0][:1].float()
            for other in columns[1:]:
                total = total + other[:1].float()
            assert all(torch.equal(share, total.to(dtype).expand_as(share)) for share in shares)


@pytest.mark.parametrize("base", [0, 1])
def test_all_to_all_moves_uneven_rows(comms: list[Communicator], base: int) -> None:
    size = len(comms)
    rows = [[(base + 2 * a + b) % 3 for b in range(size)] for a in range(size)]  # from a to b; some are 0

    def run(comm: Communicator) -> Tensor:
        send, receive = rows[comm.rank], [rows[a][comm.rank] for a in range(size)]
        return comm.all_to_all(part(comm.rank, sum(send)), send, receive)

    received = each(comms, run)
    for rank in range(size):
        pieces = [part(a, sum(rows[a])).split(rows[a])[rank] for a in range(size)]
        assert torch.equal(received[rank], torch.cat(pieces))


@pytest.mark.parametrize("rows", [3, 0])
def test_broadcast_gives_the_roots_tensor(comms: list[Communicator], rows: int) -> None:
    for root in range(len(comms)):
        found = each(comms, partial(lambda root, comm: comm.broadcast(part(comm.rank, rows), root), root))
        assert torch.equal(same_everywhere(found), part(root, rows))


def test_send_and_recv_keep_their_order(comms: list[Communicator]) -> None:
    if len(comms) == 1:
        with pytest.raises(CommError, match="group of one"):
            comms[0].send(torch.ones(1), 1)
        with pytest.raises(CommError, match="group of one"):
            comms[0].recv(torch.ones(1), 1)
        return

    def run(comm: Communicator) -> list[Tensor]:
        if comm.rank == 0:
            for i in range(3):
                x = part(i, 2)
                comm.send(x, 1).wait()
                x.zero_()  # a sent tensor is the sender's again
            pending = [comm.send(part(i, 2), 1) for i in range(3)]
            pending.append(comm.send(part(9, 0), 1))
            for send in pending:
                send.wait()
        if comm.rank == 1:
            return [comm.recv(torch.empty(rows, 3), 0) for rows in (2, 2, 2, 2, 2, 2, 0)]
        return []

    received = each(comms, run)[1]
    expected = [*(part(i, 2) for i in range(3)), *(part(i, 2) for i in range(3)), part(9, 0)]
    assert all(torch.equal(x, y) for x, y in zip(received, expected, strict=True))


def test_no_rank_leaves_a_barrier_before_the_last_has_entered(comms: list[Communicator]) -> None:
    arrived: list[int] = []

    def run(comm: Communicator) -> int:
        arrived.append(comm.rank)
        comm.barrier()
        return len(arrived)

    assert each(comms, run) == [len(comms)] * len(comms)


def test_many_operations_in_a_row_do_not_mix(comms: list[Communicator]) -> None:
    def run(comm: Communicator) -> list[float]:
        return [float(comm.all_reduce(torch.tensor([float(i + comm.rank)]))) for i in range(100)]

    size = len(comms)
    assert each(comms, run) == [[size * i + size * (size - 1) / 2 for i in range(100)]] * size


def test_traffic_counts_the_bytes_sent_to_other_ranks(comms: list[Communicator]) -> None:
    size = len(comms)
    before = {name: total.sent_bytes for name, total in comms[0].progress.read_totals().items()}

    def run(comm: Communicator) -> None:
        comm.all_reduce(torch.ones(size, 2))
        comm.all_gather(torch.ones(1 + comm.rank, 2), [1 + rank for rank in range(size)])
        comm.reduce_scatter(torch.ones(2 * size + 1, 2), [3] + [2] * (size - 1))
        comm.all_to_all(torch.ones(size, 2), [1] * size, [1] * size)
        comm.broadcast(torch.ones(5, 2), 0)

    each(comms, run)
    row, others = 8, size - 1
    sent = {name: total.sent_bytes - before.get(name, 0) for name, total in comms[0].progress.read_totals().items()}
    expected = {
        "all_reduce": 2 * others * row,
        "all_gather": others * row,
        "reduce_scatter": 2 * others * row,
        "all_to_all": others * row,
        "broadcast": 5 * others * row,
    }
    assert {name: sent[name] for name in expected if name in sent} == (expected if size > 1 else {})


def test_the_time_of_operations_is_measured(comms: list[Communicator]) -> None:
    """Rank 1 is late each time: it waits until the others have begun, and computes something first."""
    if len(comms) == 1:
        assert comms[0].progress.read_totals() == {}
        return
    before = [comm.progress.read_totals().get("all_gather", OperationTotal()) for comm in comms]

    others = [(comm.progress, comm.progress.count) for comm in comms if comm.rank != 1]

    def run(comm: Communicator) -> None:
        x = torch.ones(1)
        for done in range(20):
            if comm.rank == 1:
                while any(other.count <= first + done for other, first in others):
                    pass
                torch.randn(200, 200).inverse()
            comm.all_gather(x, [1] * comm.size)

    each(comms, run)
    after = [comm.progress.read_totals()["all_gather"] for comm in comms]
    assert [now.count - then.count for then, now in zip(before, after, strict=True)] == [20] * len(comms)
    assert all((now.ns or 0) > (then.ns or 0) for then, now in zip(before, after, strict=True))
    waits = [
        {rank: waited - then.waited_for.get(rank, 0) for rank, waited in now.waited_for.items()}
        for then, now in zip(before, after, strict=True)
    ]
    if "gloo" in comms[0].backend:
        assert [total.waited_ns for total in after] == [None] * len(comms)
        assert waits == [{}] * len(comms)
        return
    assert all(0 <= (total.waited_ns or 0) <= (total.ns or 0) for total in after)
    assert all(sum(total.waited_for.values()) == total.waited_ns for total in after)
    assert waits[0][1] > sum(waits[1].values())
    assert all(rank not in of_rank for rank, of_rank in enumerate(waits))


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_totals_go_on_when_a_group_is_formed_anew(kind: Any) -> None:
    store, device = c10d.HashStore(), torch.device("cpu")

    def run(rank: int) -> list[dict[str, OperationTotal]]:
        comm, found = None, []
        for prefix in "abc":
            if comm is None:
                comm = ProcessComm(store, prefix, rank, 2, requested=kind, timeout_s=60, device=device)
            else:
                comm.connect(store, prefix)
            comm.all_reduce(torch.ones(5000))
            found.append(comm.progress.read_totals())
        return found

    for totals in on_threads(2, run):
        assert [list(total) for total in totals] == [["all_reduce"]] * 3  # forming a group moves no tensors
        counts = [total["all_reduce"].count for total in totals]
        times = [total["all_reduce"].ns or 0 for total in totals]
        assert counts == [1, 2, 3]
        assert 0 < times[0] < times[1] < times[2]


def test_the_wait_for_a_send_between_threads_counts() -> None:
    sender, receiver = connect("threads", 2, timeout_s=60)
    pending = sender.send(torch.ones(3), 1)
    waiter = threading.Thread(target=pending.wait, daemon=True)
    waiter.start()
    while not sender.progress.operation:
        pass
    receiver.recv(torch.empty(3), 0)
    waiter.join(60)
    total = sender.progress.read_totals()["send"]
    assert total.waited_for == {1: total.waited_ns}
    assert 0 < (total.waited_ns or 0) <= (total.ns or 0)


def test_progress_names_the_last_operation(comms: list[Communicator]) -> None:
    before = comms[0].progress.count
    each(comms, lambda comm: comm.all_reduce(torch.ones(1)))
    done = 1 if len(comms) > 1 else 0  # a group of one has nothing to do
    assert str(comms[0].progress) == f"after operation #{before + done}"


@pytest.mark.parametrize("kind", ["threads", "gloo", "shm"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_timeout_names_the_rank_and_the_operation(kind: str, operation: str) -> None:
    comm, _absent = connect(kind, 2, timeout_s=0.2)
    begun = time.monotonic()
    with pytest.raises(CommTimeout, match=r"rank 0\b.* waited 0.2 s") as caught:
        OPERATIONS[operation](comm)
    assert 0.15 < time.monotonic() - begun < 5
    name = "all_reduce" if kind == "gloo" and operation == "barrier" else operation
    assert name in str(caught.value)
    assert comm.progress.operation == name


def test_a_timeout_of_threads_names_all_missing_ranks() -> None:
    comms = connect("threads", 4, timeout_s=0.2)
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(comms[rank].barrier) for rank in (0, 2)]
        for wait in waits:
            with pytest.raises(CommTimeout, match=r"barrier #1 waited 0.2 s for ranks \[1, 3\]"):
                wait.result()


def test_a_rank_that_arrives_at_the_last_moment_is_not_missing() -> None:
    """A wait that times out checks again: the others may have arrived while it took the lock again."""

    class TimesOut(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            group.exchange(1, "theirs", "barrier")
            return False

    group = ThreadGroup(2, 0.2, condition=TimesOut())
    assert group.exchange(0, "mine", "barrier") == ["mine", "theirs"]


@pytest.mark.parametrize("kind", ["threads", "gloo", "shm"])
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "recv"])
@pytest.mark.parametrize("caller", [0, 1])
def test_an_abort_on_any_rank_ends_a_wait(kind: str, operation: str, caller: int) -> None:
    comms = connect(kind, 2, timeout_s=1.5)
    check_abort(comms, operation, caller)
    if kind == "gloo" and caller == 0:
        # Rank 1 does not know of the abort yet: it may still complete this one operation, which rank 0 had entered.
        with suppress(CommAborted):
            OPERATIONS[operation](comms[1])
    for comm in comms:
        with pytest.raises(CommAborted):
            OPERATIONS[operation](comm)
        comm.abort()


def test_an_abort_ends_a_recv_between_threads() -> None:
    comms = connect("threads", 2, timeout_s=20)
    check_abort(comms, "recv", 1)
    for comm in comms:
        with pytest.raises(CommAborted):
            comm.send(torch.ones(1), 1 - comm.rank)


def check_abort(comms: Sequence[Communicator], operation: str, caller: int) -> None:
    """Abort while rank 0 waits, and check its error: without the abort it would be a CommTimeout."""
    failed: list[Exception] = []

    def wait() -> None:
        try:
            OPERATIONS[operation](comms[0])
        except CommError as error:
            failed.append(error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    while not comms[0].progress.operation:
        pass
    comms[caller].abort()
    waiter.join(10)
    assert not waiter.is_alive()
    assert [type(error) for error in failed] == [CommAborted]
    assert "rank 0" in str(failed[0])


# --- pending sends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["threads", "gloo"])
def test_the_wait_for_a_send_names_its_number(kind: str) -> None:
    sender, _receiver = connect(kind, 2, timeout_s=0.2)
    number = sender.progress.count + 1
    first, _second = sender.send(torch.ones(3), 1), sender.send(torch.ones(3), 1)
    assert str(sender.progress) == f"after operation #{number + 1}"
    with pytest.raises(CommTimeout, match=rf"rank 0\b.*send #{number} waited 0.2 s"):
        first.wait()
    assert str(sender.progress) == f"send #{number}"


def test_an_abort_ends_the_wait_of_a_send_between_threads() -> None:
    sender, receiver = connect("threads", 2, timeout_s=60)
    pending, failed = sender.send(torch.ones(3), 1), threading.Event()

    def wait() -> None:
        with pytest.raises(CommAborted, match="send #1"):
            pending.wait()
        failed.set()

    threading.Thread(target=wait, daemon=True).start()
    while not sender.progress.operation:
        pass
    receiver.abort()
    assert failed.wait(60)


def test_threads_refuse_a_tensor_of_another_shape() -> None:
    sender, receiver = connect("threads", 2, timeout_s=60)
    sender.send(torch.ones(1, 3), 1)
    with pytest.raises(CommError, match=r"recv of torch.float32 \[2, 3\], but rank 0 sent torch.float32 \[1, 3\]"):
        receiver.recv(torch.empty(2, 3), 0)


@pytest.mark.parametrize("kind", ["threads", "gloo", "shm"])
def test_a_recv_fills_the_given_tensor(kind: str) -> None:
    comms = connect(kind, 2, timeout_s=60)
    buffer = torch.zeros(3)

    def run(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.send(torch.arange(3.0), 1).wait()
        else:
            assert comm.recv(buffer, 0) is buffer

    each(comms, run)
    assert buffer.tolist() == [0, 1, 2]


# --- stores that fail --------------------------------------------------------------------------------------------


class FailingStore(c10d.Store):  # type: ignore[misc]
    """A store that loses the ranks' calls once `fails` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = False
        self.called = threading.Event()
        self.answers: threading.Event | None = None  # a call waits for this event; None: a call raises an error
        self._store = c10d.HashStore()

    def check(self, keys: Sequence[str]) -> bool:
        self._fail()
        found: bool = self._store.check(keys)
        return found

    def set(self, key: str, value: bytes) -> None:
        self._fail()
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        found: bytes = self._store.get(key)
        return found

    def wait(self, keys: Sequence[str], timeout: timedelta = timedelta(seconds=60)) -> None:
        self._store.wait(keys, timeout)

    def _fail(self) -> None:
        if not self.fails:
            return
        self.called.set()
        if self.answers is None:
            raise CommTimeout("the rendezvous has gone")
        self.answers.wait(60)


def over_failing_store(timeout_s: float) -> tuple[FailingStore, list[Communicator]]:
    """Return connected communicators, and their store, which fails from now on."""
    store = FailingStore()
    comms = connect("gloo", 2, timeout_s, store)
    store.fails = True
    return store, comms


def test_a_dead_store_does_not_hide_the_error_of_an_operation() -> None:
    _store, comms = over_failing_store(0.2)
    with pytest.raises(CommTimeout, match=r"rank 0 of 2: all_reduce #1 waited 0.2 s"):
        comms[0].all_reduce(torch.ones(1))
    for comm in comms:
        comm.abort()
        with pytest.raises(CommAborted):
            comm.all_reduce(torch.ones(1))


@pytest.mark.parametrize("dead", [True, False])
def test_a_dead_or_silent_store_does_not_delay_an_operation(dead: bool) -> None:
    store, comms = over_failing_store(60)
    store.answers = None if dead else threading.Event()

    def run(comm: Communicator) -> list[float]:
        if comm.rank == 1:
            assert store.called.wait(60)
        found: list[float] = comm.all_reduce(torch.ones(1)).tolist()
        return found

    assert each(comms, run) == [[2.0], [2.0]]
    if store.answers is not None:
        assert not store.answers.is_set()
        store.answers.set()
