"""Replicas in processes and threads of their own: requests, failures whose cause is named, and the end."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster.replicas.replica import EngineProcess, EngineThread, Replica
from shoal.cluster.replicas.replica_client import await_ready
from shoal.errors import ClosedError, EngineError, UserError
from shoal.launch.launchers import ENGINE_PROCESS
from shoal.transport.channel import Channel, wait
from shoal.wire.base import encode, replace_fields
from shoal.wire.engine import EngineFailure, EngineRequest, EngineStats, Finish, SeqUpdate, to_engine
from shoal.wire.plan import EnginePlan, ReplicaPlace
from shoal.wire.ranks import Sampling
from shoal.wire.tokens import encode_tokens
from support.plans import bare_plan, engine_plan

pytestmark = pytest.mark.slow  # starts processes

Checkpoint = Callable[[str], Path]

OPTIONS: dict[str, Any] = {"distributed_executor_backend": "uni", "kv_cache_memory_bytes": 2**20}
TOO_SMALL: dict[str, Any] = {"asked_model_len": 10**6}  # more than the KV cache holds; the engine refuses it


def start(
    checkpoint: Checkpoint, place: ReplicaPlace | None = None, options: Mapping[str, Any] = OPTIONS, **changes: Any
) -> EngineProcess:
    plan = engine_plan(checkpoint("llama"), place or ReplicaPlace(), **options)
    return EngineProcess(ENGINE_PROCESS, replace_fields(plan, **changes), answer_timeout=60)


@pytest.fixture
def engine(checkpoint: Checkpoint) -> Iterator[EngineProcess]:
    process = start(checkpoint)
    process.await_ready(120)
    yield process
    process.close()


@pytest.fixture(scope="module")
def lasting(checkpoint: Checkpoint) -> Iterator[EngineProcess]:
    """An engine of several tests, the last of which closes it."""
    process = start(checkpoint)
    process.await_ready(120)
    yield process
    process.close()


def request(seq: int, max_tokens: int) -> EngineRequest:
    return EngineRequest(seq, encode_tokens([5, 6, 7]), 3, Sampling(seed=seq), max_tokens)


def finished(engine: Replica, count: int) -> dict[int, SeqUpdate]:
    found: dict[int, SeqUpdate] = {}
    while len(found) < count:
        for update in engine.updates(1.0):
            if update.finish is not None:
                assert update.seq not in found, "a request ends twice"
                found[update.seq] = update
    return found


def gone(pid: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        os.sched_yield()
    return False


def test_requests_aborts_and_stats(lasting: EngineProcess) -> None:
    for seq in range(4):
        lasting.add(request(seq, max_tokens=5 if seq != 2 else 250))
    lasting.abort([2, 2, 99])
    found = finished(lasting, 4)
    assert [found[seq].finish for seq in range(4)] == [
        Finish.LENGTH,
        Finish.LENGTH,
        Finish.ABORT,
        Finish.LENGTH,
    ]
    lasting.abort([0])
    stats = lasting.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.free_blocks == stats.num_blocks
    assert stats.ranks[0].pid == lasting.pid


def test_a_request_that_can_never_run_ends_alone(lasting: EngineProcess) -> None:
    lasting.add(request(0, max_tokens=5))
    lasting.add(request(1, max_tokens=10_000))
    found = finished(lasting, 2)
    assert found[0].finish is Finish.LENGTH
    assert found[1].finish is Finish.ABORT
    assert "10000" in found[1].error


def test_close_ends_the_process_and_is_idempotent(lasting: EngineProcess) -> None:
    lasting.close()
    lasting.close()
    assert gone(lasting.pid, within=5)
    with pytest.raises(ClosedError):
        lasting.stats()


def test_a_killed_process_is_named(engine: EngineProcess) -> None:
    engine.add(request(0, max_tokens=250))
    engine.updates(1.0)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=f"engine process {engine.pid} was killed by SIGKILL"):
        finished(engine, 1)
    with pytest.raises(ClosedError, match="SIGKILL"):
        engine.add(request(1, max_tokens=5))
    engine.abort([0])  # idempotent in every state


def test_a_stopped_process_is_named_and_killed(engine: EngineProcess) -> None:
    engine.add(request(0, max_tokens=250))
    os.kill(engine.pid, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(EngineError, match=f"engine process {engine.pid} is stopped"):
        finished(engine, 1)
    assert time.monotonic() - begun < 10
    assert gone(engine.pid, within=5)


def test_a_rank_that_dies_while_the_engine_is_idle_is_replaced(checkpoint: Checkpoint) -> None:
    engine = start(checkpoint, options={**OPTIONS, "distributed_executor_backend": "mp", "tensor_parallel_size": 2})
    engine.await_ready(120)
    before = [rank.pid for rank in engine.stats().ranks]
    os.kill(before[1], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (after := [rank.pid for rank in engine.stats().ranks]) == before and time.monotonic() < deadline:
        engine.updates(1.0)
    assert after[0] == before[0]
    assert after[1] != before[1]
    engine.add(request(0, max_tokens=5))
    assert finished(engine, 1)[0].finish is Finish.LENGTH
    engine.close()


def test_a_busy_engine_sends_snapshots_and_a_last_one_when_it_becomes_idle(engine: EngineProcess) -> None:
    engine.add(request(0, max_tokens=200))
    finished(engine, 1)
    while engine.snapshot is None or engine.snapshot.running or not engine.snapshot.ranks:
        engine.updates(1.0)
    assert engine.snapshot.generated_tokens == 200
    assert engine.snapshot.free_blocks == engine.snapshot.num_blocks
    assert sum(engine.snapshot.iteration_tokens) == 200, "each step has one token"
    last = engine.snapshot
    deadline = time.monotonic() + 2.5
    while (left := deadline - time.monotonic()) > 0:
        assert not engine.updates(left)
    assert engine.snapshot is last, "an idle engine sends no snapshots"


class SlowHost:
    """A process that takes long to end."""

    def __init__(self) -> None:
        self.channel, self._theirs = Channel.pair()
        self.may_end = threading.Event()
        self.has_ended = threading.Event()

    def stopped(self) -> bool:
        return False

    def describe_exit(self, patience: float = 1.0) -> str:
        return "was killed"

    def say(self, goodbye: bytes) -> None:
        pass

    def wait(self, timeout: float) -> bool:
        return self.has_ended.is_set()

    def kill(self) -> None:
        assert self.may_end.wait(60)
        self.has_ended.set()
        self.channel.close()

    def send_last(self, frame: bytes | None) -> None:
        """Send the last frame, if there is one, and close the channel."""
        end = Channel(self._theirs)
        if frame is not None:
            end.send(frame)
        end.close()


@pytest.mark.parametrize("frame", [None, encode(EngineFailure("it failed")), b"\xff\xff"])
def test_only_close_waits_for_the_end_of_a_failed_process(frame: bytes | None) -> None:
    host = SlowHost()
    replica = Replica(host, bare_plan(), name="replica 0", answer_timeout=60)
    host.send_last(frame)
    with pytest.raises(EngineError, match=r"replica 0 was killed|it failed|cannot be decoded"):
        replica.updates(60)
    replica.abandon()
    assert not host.has_ended.is_set()
    threading.Timer(0.1, host.may_end.set).start()
    replica.close()
    assert host.has_ended.is_set()


def test_a_failed_process_is_killed_even_if_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = SlowHost()
    host.may_end.set()
    replica = Replica(host, bare_plan(), name="replica 0", answer_timeout=60)
    host.send_last(None)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(EngineError, match="replica 0 was killed"):
            replica.updates(60)
    assert host.has_ended.is_set()
    replica.close()


# --- the start of several replicas -------------------------------------------------------------------------------


def test_a_replica_that_fails_at_the_start_ends_the_others_and_is_named(checkpoint: Checkpoint) -> None:
    options: list[dict[str, Any]] = [{}, TOO_SMALL]
    replicas = {
        number: start(checkpoint, ReplicaPlace(number, 2, number, 2), **changes)
        for number, changes in enumerate(options)
    }
    with pytest.raises(
        UserError, match=rf"^replica 1 \(process {replicas[1].pid}\): .* one request of --max-model-len 1000000"
    ):
        await_ready(replicas, timeout=120)
    assert all(gone(replica.pid, within=5) for replica in replicas.values())


def test_a_replica_that_is_killed_at_the_start_ends_the_others_and_is_named(checkpoint: Checkpoint) -> None:
    replicas = {number: start(checkpoint, ReplicaPlace(number, 2, number, 2)) for number in range(2)}
    os.kill(replicas[0].pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=rf"^replica 0 \(process {replicas[0].pid}\) was killed by SIGKILL"):
        await_ready(replicas, timeout=120)
    assert all(gone(replica.pid, within=5) for replica in replicas.values())


def test_replicas_that_are_not_ready_in_time_are_named(checkpoint: Checkpoint) -> None:
    replicas = {number: start(checkpoint, ReplicaPlace(number, 2, number, 2)) for number in range(2)}
    for replica in replicas.values():
        os.kill(replica.pid, signal.SIGSTOP)
    with pytest.raises(
        EngineError, match=r"replica 0 \(process \d+\), replica 1 \(process \d+\): not ready within 0.1 s"
    ):
        await_ready(replicas, timeout=0.1)
    assert all(gone(replica.pid, within=5) for replica in replicas.values())


def test_an_engine_on_a_thread_has_the_same_messages_and_errors() -> None:
    def receive_plan(channel: Channel) -> EnginePlan:
        while not wait([channel], 60) or not (frames := channel.receive()):
            pass
        plan = to_engine.decode(frames[0])
        assert isinstance(plan, EnginePlan)
        return plan

    def refuse(channel: Channel) -> None:
        plan = receive_plan(channel)
        channel.send(encode(EngineFailure(f"no {plan.name}", user_error=True)))

    def end(channel: Channel) -> None:
        receive_plan(channel)

    def refuse_later(channel: Channel) -> None:
        receive_plan(channel)
        channel.send(encode(EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)))
        refuse_now(channel)

    def refuse_now(channel: Channel) -> None:
        channel.send(encode(EngineFailure("no tokenizer", user_error=True)))

    later = EngineThread(refuse_later, bare_plan(place=ReplicaPlace(3, 4)), answer_timeout=60)
    later.await_ready(60)
    with pytest.raises(EngineError, match=r"^replica 3 \(thread\): no tokenizer$"):  # no UserError after the start
        finished(later, 1)
    replica = EngineThread(refuse, bare_plan(place=ReplicaPlace(3, 4)), answer_timeout=60)
    with pytest.raises(UserError, match=r"^replica 3 \(thread\): no model$"):
        replica.await_ready(60)
    ended = EngineThread(end, bare_plan(place=ReplicaPlace(3, 4)), answer_timeout=60)
    with pytest.raises(EngineError, match=r"^replica 3 \(thread\) has ended$"):
        ended.await_ready(60)
    with pytest.raises(ClosedError):
        ended.add(request(0, 1))
