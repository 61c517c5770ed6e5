"""Serving an engine over a channel, and which failures are reported to whom and when."""

import threading
import time
from collections.abc import Mapping
from typing import TypeVar

import pytest

from shoal.engine.build import AwaitNodes
from shoal.engine.core import EngineCore
from shoal.engine.lockstep.member import LockstepMember, SharedProgress
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.serve_channel import serve, serve_client
from shoal.errors import ConfigError, EngineError
from shoal.transport.channel import Channel, wait
from shoal.wire.base import Stop, encode
from shoal.wire.engine import Abort, EngineFailure, EngineStats, Finish, StatsQuery, Updates, from_engine
from shoal.wire.lockstep import LockstepState
from shoal.wire.plan import EnginePlan, ReplicaPlace
from shoal.wire.ranks import StepResult
from support.fakes import FakeExecutor, request
from support.plans import bare_plan

T = TypeVar("T")


class Peers(SharedProgress):
    """A lockstep whose other members may have failed."""

    backlog = False

    def __init__(self, failure: str = "") -> None:
        super().__init__(0)
        self.failure = failure
        self.told: list[str] = []

    def others(self) -> Mapping[int, LockstepState]:
        if self.failure:
            raise EngineError(self.failure)
        return {}

    def tell(self, state: LockstepState) -> None:
        raise NotImplementedError

    def fileno(self) -> int:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def close(self, why: str = "") -> None:
        self.told.append(why)


def run_failing_start(peers: Peers, error: Exception) -> tuple[int, EngineFailure]:
    """Serve an engine that fails to start. Return the exit code and the failure that the client gets."""
    client, theirs = Channel.pair()
    engine = Channel(theirs)
    client.send(encode(bare_plan(place=ReplicaPlace(1, 2))))

    def start(plan: EnginePlan, lockstep: LockstepMember | None, await_nodes: AwaitNodes) -> EngineCore:
        raise error

    code = serve(engine, lambda setup: peers, start)
    (frame,) = client.receive()
    failure = from_engine.decode(frame)
    assert isinstance(failure, EngineFailure)
    engine.close()
    client.close()
    return code, failure


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("no such model"), 2, "no such model"),
        (EngineError("out of memory"), 1, "out of memory"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
    ],
)
def test_a_failure_at_start_is_reported_to_client_and_replicas(error: Exception, code: int, told: str) -> None:
    peers = Peers()
    assert run_failing_start(peers, error) == (code, EngineFailure(told, code == 2))
    assert peers.told[0] == f"replica 1: {told}"


def test_the_failure_of_another_replica_is_reported_as_the_cause() -> None:
    peers = Peers("replica 0 (host, process 7) is out of memory")
    assert run_failing_start(peers, EngineError("no connection")) == (1, EngineFailure(peers.failure, user_error=False))


def test_the_other_replicas_hear_of_a_failure_before_the_client_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may end the process as soon as it gets the failure."""
    peers = Peers()
    send = Channel.send

    def watch_channel(channel: Channel, frame: bytes) -> None:
        sent_before.append(bool(peers.told))
        send(channel, frame)

    sent_before: list[bool] = []
    monkeypatch.setattr(Channel, "send", watch_channel)
    run_failing_start(peers, EngineError("out of memory"))
    assert sent_before == [False, True], "the plan and the failure"


class Held(FakeExecutor):
    """Ranks whose results are held back until the test releases them."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Semaphore(0)

    def poll(self, timeout: float) -> list[StepResult]:
        return super().poll(timeout) if self.let_go.acquire(timeout=timeout) else []


def test_an_abort_frees_blocks_before_the_running_step_has_ended() -> None:
    ranks = Held()
    engine = EngineCore(ranks, SchedulerLimits(8, 64, 64), block_size=4, prefix_caching=True, max_in_flight=2)
    client, theirs = Channel.pair()
    server = Channel(theirs)
    serving = threading.Thread(target=serve_client, args=(server, engine, None))
    serving.start()

    def receive_next(kind: type[T], timeout: float = 60.0) -> T:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            wait([client], deadline - time.monotonic())
            for message in map(from_engine.decode, client.receive()):
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__}")

    try:
        client.send(encode(request(1, range(9), 40)))
        for token in range(3):
            ranks.let_go.release()
            (update,) = receive_next(Updates).updates
            assert len(update.tokens) == 1, token
        client.send(encode(Abort((1,))))
        (update,) = receive_next(Updates).updates
        assert update.finish is Finish.ABORT
        launched = len(ranks.plans)
        client.send(encode(StatsQuery()))
        stats = receive_next(EngineStats)
        assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)
        assert launched <= 3 + 2, "only the steps that were in flight when the abort came"
        ranks.let_go.release(10)
        client.send(encode(request(2, range(9), 1)))
        assert receive_next(Updates).updates[0].seq == 2
        assert [work.seq for plan in ranks.plans[launched:] for work in plan.work] == [2]
    finally:
        client.send(encode(Stop()))
        serving.join(60)
        server.close()
        client.close()
