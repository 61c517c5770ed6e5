"""Tests of communicators on shared memory, beside those of every communicator in test_comm.py."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.comm import formation
from shoal.comm.process_comm import ProcessComm
from shoal.comm.shared_file_store import SharedFileStore
from shoal.comm.shared_memory import SharedMemory, SharedMemoryComm
from shoal.comm.shared_memory_library import load_library
from shoal.comm.torch_distributed import c10d
from shoal.errors import CommAborted, CommError, CommTimeout
from shoal.kernels.native import load_native
from shoal.kernels.native_calls import sum_over
from shoal.kernels.recording import Pool, Recorder
from support.example_counts import examples
from support.fakes import on_threads
from support.shared_memory_rank import all_reduce, connect_and_add

pytestmark = pytest.mark.skipif(load_library()[0] is None, reason=load_library()[1])
RANK = Path(__file__).parent.parent / "support" / "shared_memory_rank.py"
SOURCE = Path(__file__).parent.parent.parent / "src"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8]
COPIED_DTYPES = [torch.bfloat16, torch.bool, torch.int8]  # no sums


def connect(size: int, requested: Any = "shm", timeout_s: float = 60) -> list[ProcessComm]:
    store, cpu = c10d.HashStore(), torch.device("cpu")
    return on_threads(
        size,
        lambda rank: ProcessComm(store, "g", rank, size, requested=requested, timeout_s=timeout_s, device=cpu),
    )


@pytest.fixture(scope="module")
def groups() -> dict[int, list[ProcessComm]]:
    return {size: connect(size) for size in (2, 3, 5)}


def numbers(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + count)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (count,), generator=generator).to(dtype)


def in_rank_order(parts: Sequence[Tensor]) -> Tensor:
    """The sum as it is promised: rank after rank, half-precision types in float32."""
    dtype = parts[0].dtype
    total = parts[0].to(torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype)
    for part in parts[1:]:
        total = total + part.to(total.dtype)
    return total.to(dtype)


# One round takes 16 KB of an all-reduce and 256 KB of the others: the counts are around these, and odd.
COUNTS = [0, 1, 31, 33, 4095, 4097, 20_001, 70_001, 300_007]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_adds_in_rank_order(groups: dict[int, list[ProcessComm]], dtype: torch.dtype, size: int) -> None:
    for count in COUNTS:
        inputs = [numbers(rank, count, dtype) for rank in range(size)]
        expected = in_rank_order(inputs)
        found = on_threads(size, lambda rank: groups[size][rank].all_reduce(inputs[rank].clone()))  # noqa: B023
        assert all(torch.equal(each, expected) for each in found), f"{count} elements"


@given(data=st.data())
@settings(max_examples=examples(60), deadline=None)
def test_rows_reach_their_ranks(groups: dict[int, list[ProcessComm]], data: st.DataObject) -> None:
    """Uneven all_gather, reduce_scatter and all_to_all of any size, over several rounds."""
    size = data.draw(st.sampled_from([2, 3, 5]))
    comms, columns = groups[size], data.draw(st.sampled_from([1, 3, 1000]))
    rows = st.one_of(st.integers(0, 5), st.integers(0, 300))
    dtype = data.draw(st.sampled_from(COPIED_DTYPES))
    sizes = data.draw(st.lists(rows, min_size=size, max_size=size))
    pieces = [numbers(rank, sizes[rank] * columns, dtype).view(-1, columns) for rank in range(size)]
    for found in on_threads(size, lambda rank: comms[rank].all_gather(pieces[rank], sizes)):
        assert torch.equal(found, torch.cat(pieces))

    summed = data.draw(st.sampled_from(DTYPES))
    whole = [numbers(rank, sum(sizes) * columns, summed).view(-1, columns) for rank in range(size)]
    shares = in_rank_order(whole).split(sizes)
    for rank, found in enumerate(on_threads(size, lambda rank: comms[rank].reduce_scatter(whole[rank], sizes))):
        assert torch.equal(found, shares[rank])

    counts = [data.draw(st.lists(rows, min_size=size, max_size=size)) for _ in range(size)]  # [from][to]
    sent = [numbers(rank, sum(counts[rank]) * columns, dtype).view(-1, columns) for rank in range(size)]
    received = on_threads(
        size, lambda rank: comms[rank].all_to_all(sent[rank], counts[rank], [row[rank] for row in counts])
    )
    for rank, found in enumerate(received):
        assert torch.equal(found, torch.cat([sent[r].split(counts[r])[rank] for r in range(size)]))


@given(data=st.data())
@settings(max_examples=examples(20), deadline=None)
def test_messages_of_any_size_arrive_in_order(groups: dict[int, list[ProcessComm]], data: st.DataObject) -> None:
    """The sender may be far ahead: messages wrap around the arena of the pair."""
    bytes_of_message = st.one_of(st.integers(0, 200), st.integers(0, 6 << 20))
    sizes = data.draw(st.lists(bytes_of_message, min_size=1, max_size=30))
    content = numbers(0, max(sizes) + len(sizes), torch.uint8)

    def run(rank: int) -> bool:
        comm = groups[2][rank]
        for number, size in enumerate(sizes):
            message = content[number : number + size]
            if rank == 0:
                comm.send(message, 1).wait()
            elif not torch.equal(comm.recv(torch.empty(size, dtype=torch.uint8), 0), message):
                return False
        return True

    assert on_threads(2, run) == [True, True]


def test_both_ranks_may_send_before_they_receive(groups: dict[int, list[ProcessComm]]) -> None:
    def run(rank: int) -> bool:
        comm, x = groups[2][rank], torch.full((3 << 20,), rank, dtype=torch.uint8)
        for _ in range(3):
            comm.send(x, 1 - rank).wait()
        return all(bool((comm.recv(torch.empty_like(x), 1 - rank) == 1 - rank).all()) for _ in range(3))

    assert on_threads(2, run) == [True, True]


def test_a_receiver_that_waits_for_another_size_is_told() -> None:
    comms = connect(2)
    comms[0].send(torch.ones(3), 1).wait()
    with pytest.raises(CommError, match="rank 1: recv #1: rank 0 called another operation, or the same with"):
        comms[1].recv(torch.ones(4), 0)


def test_ranks_that_call_different_operations_are_told() -> None:
    comms = connect(2)

    def run(rank: int) -> str:
        with pytest.raises(CommError) as caught:
            comms[0].all_reduce(torch.ones(3)) if rank == 0 else comms[1].broadcast(torch.ones(3), 0)
        with pytest.raises(CommError, match="cannot begin: an earlier operation has failed"):
            comms[rank].barrier()
        return str(caught.value)

    first, second = on_threads(2, run)
    assert "rank 0: all_reduce #1: rank 1 called another operation" in first
    assert "rank 1: broadcast #1: rank 0 called another operation" in second


def test_a_type_without_sums_is_refused(groups: dict[int, list[ProcessComm]]) -> None:
    with pytest.raises(CommError, match=r"rank 0: torch\.bool cannot be summed over shared memory"):
        groups[2][0].all_reduce(torch.ones(1, dtype=torch.bool))


def test_the_memory_has_no_name_and_costs_what_is_written() -> None:
    before = set(os.listdir("/proc/self/fd"))
    comms = connect(3)
    on_threads(3, lambda rank: comms[rank].all_reduce(torch.ones(1)))
    mapped = [line for line in Path("/proc/self/smaps").read_text().split("\n\n") if "shoal-comm" in line]
    assert set(os.listdir("/proc/self/fd")) == before, "all ranks have mapped it"
    assert mapped
    found = Path("/proc/self/smaps_rollup").read_text()
    shared = next(int(line.split()[1]) for line in found.splitlines() if line.startswith("Pss_Shmem"))
    assert shared < 64 << 10, "kB; the address space of three ranks is over 2 GB"


def test_ranks_that_cannot_map_it_take_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> SharedMemory:
        raise PermissionError("not here")

    monkeypatch.setattr(SharedMemory, "open", refuse)
    comms = connect(2, "auto")
    assert [comm.backend for comm in comms] == ["gloo (rank 1 cannot map shared memory: not here)"] * 2
    assert on_threads(2, lambda rank: comms[rank].all_reduce(torch.ones(1)).item()) == [2.0, 2.0]


def test_ranks_of_several_hosts_take_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = iter(["a", "b"])
    monkeypatch.setattr(formation, "host_identity", lambda: next(hosts))
    comms = connect(2, "auto")
    assert [comm.backend for comm in comms] == ["gloo (the 2 ranks are on 2 hosts)"] * 2


def test_memory_of_another_group_is_refused() -> None:
    memory = SharedMemory.make(2)
    memory.nonce += 1
    with pytest.raises(CommError, match="that of another group"):
        SharedMemoryComm(memory, 0, [os.getpid()] * 2, timeout_s=1)


# --- replays -----------------------------------------------------------------------------------------------------

needs_native = pytest.mark.skipif(load_native()[0] is None, reason=load_native()[1])


def replayed(comm: ProcessComm, x: Tensor) -> Tensor:
    """Do the same as `all_reduce`, by a replay without Python in it."""
    with Recorder(Pool()) as recorder:
        sum_over(comm, x)
    recording = recorder.recording()
    assert recording.parts == 1
    recording.replay()
    return x


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replays_and_calls_are_the_same_operation(groups: dict[int, list[ProcessComm]], dtype: torch.dtype) -> None:
    """Rank 1 replays what the others call. All count and measure it in the same way."""
    for count in (33, 4097, 70_001):
        inputs = [numbers(rank, count, dtype) for rank in range(3)]
        before = [comm.progress.read_total("all_reduce") for comm in groups[3]]

        def run(rank: int) -> Tensor:
            return (replayed if rank == 1 else ProcessComm.all_reduce)(groups[3][rank], inputs[rank].clone())  # noqa: B023

        assert all(torch.equal(each, in_rank_order(inputs)) for each in on_threads(3, run))
        after = [comm.progress.read_total("all_reduce") for comm in groups[3]]
        totals = list(zip(before, after, strict=True))
        assert [now.count - then.count for then, now in totals] == [1] * 3
        assert len({now.sent_bytes - then.sent_bytes for then, now in totals}) == 1
        assert all((now.ns or 0) > (then.ns or 0) for then, now in totals)


def failures(cause: str, all_reduce: Callable[[ProcessComm, Tensor], Tensor]) -> list[tuple[type[CommError], str]]:
    """Let rank 0 fail twice, and return its errors."""
    comms = connect(2, timeout_s=0.2 if cause == "a rank that does not come" else 60)
    found: list[tuple[type[CommError], str]] = []

    def other() -> None:
        if cause == "another size":
            with pytest.raises(CommError):
                comms[1].all_reduce(torch.ones(3))
        if cause == "an abort":
            while not comms[0].progress.operation:
                pass
            comms[1].abort()

    def run(rank: int) -> None:
        if rank == 1:
            other()
            return
        for _ in range(2):
            with pytest.raises(CommError) as caught:
                all_reduce(comms[0], torch.ones(2))
            found.append((caught.type, str(caught.value)))
            assert comms[0].progress.operation == "all_reduce"

    on_threads(2, run)
    return found


@needs_native
@pytest.mark.parametrize(
    ("cause", "error", "text"),
    [
        ("a rank that does not come", CommTimeout, "waited 0.2 s for rank 1"),
        ("an abort", CommAborted, "was aborted"),
        ("another size", CommError, "rank 1 called another operation, or the same with another size"),
    ],
)
def test_a_replay_fails_like_the_call(cause: str, error: type[CommError], text: str) -> None:
    """It raises the same error with the same text, and the rank stays in the operation."""
    found = failures(cause, replayed)
    assert found == failures(cause, ProcessComm.all_reduce)
    assert found[0][0] is error
    assert found[0][1].startswith("rank 0: all_reduce #1")
    assert text in found[0][1]
    assert found[1][1].startswith("rank 0: all_reduce #2")


@needs_native
def test_a_rank_in_a_replay_is_seen_in_the_operation() -> None:
    """Other threads see it, and other ranks name it."""
    comms = connect(2, timeout_s=60)

    def run(rank: int) -> tuple[int, str]:
        if rank == 0:
            replayed(comms[0], torch.ones(2))
            return comms[0].progress.count, str(comms[0].progress)
        while not comms[0].progress.operation:
            pass
        seen = comms[0].progress.count, str(comms[0].progress)
        comms[1].all_reduce(torch.ones(2))
        return seen

    assert on_threads(2, run) == [(1, "after operation #1"), (1, "all_reduce #1")]


# --- processes ---------------------------------------------------------------------------------------------------


ENDS = {
    "spinning": r"waited 1 s for rank 2 \(process {pid}, after operation #20\)",
    "stopped": r"waited 1 s for rank 2 \(process {pid}, after operation #20, stopped\)",
    "killed": r"rank 2 \(process {pid}\) has ended",
}


@pytest.mark.slow
def test_the_others_name_the_rank_that_does_not_arrive() -> None:
    """A process is the last rank of three groups. It spins, is stopped, and is killed; each time one group waits."""
    file = os.memfd_create("store")
    command = [sys.executable, str(RANK), str(SOURCE), str(file), *ENDS]
    process = subprocess.Popen(command, pass_fds=[file], stdout=subprocess.PIPE, text=True)
    try:
        stores = [SharedFileStore(file, timeout_s=60) for _ in range(2)]

        def join(rank: int) -> dict[str, ProcessComm]:
            return {name: connect_and_add(stores[rank], name, rank) for name in ENDS}

        comms = on_threads(2, join)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for name, cause in ENDS.items():
            if name == "stopped":
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
            elif name == "killed":
                process.kill()

            def wait(rank: int) -> str:
                with pytest.raises(CommError) as caught:
                    all_reduce(comms[rank][name], torch.ones(1))  # noqa: B023
                return str(caught.value)

            for rank, error in enumerate(on_threads(2, wait)):
                assert error.startswith(f"rank {rank}: all_reduce #21")
                assert re.search(cause.format(pid=process.pid), error), error
    finally:
        process.kill()
        process.communicate()
        os.close(file)


def test_an_abort_while_a_group_forms_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The abort comes when all have mapped the memory, and before the group is known."""
    aborted = threading.Event()
    close_file = SharedMemory.close_file

    def abort(memory: SharedMemory) -> None:
        aborted.set()
        close_file(memory)

    monkeypatch.setattr(SharedMemory, "close_file", abort)
    store = c10d.HashStore()

    def run(rank: int) -> None:
        with pytest.raises(CommAborted):
            ProcessComm(store, "g", rank, 2, timeout_s=60, device=torch.device("cpu"), aborted=aborted)

    on_threads(2, run)
