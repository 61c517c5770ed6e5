"""Replicas that launch every step together, over fake ranks that end a step only together."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from shoal.engine.core import EngineCore
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.errors import ClosedError, EngineError
from shoal.wire.engine import EngineRequest
from shoal.wire.ranks import StepResult
from support.fakes import FakeExecutor, FakeLockstep, FaultyExecutor, Outcomes, alone, request, steady
from support.replica_machine import ReplicaMachine

MAX_MODEL_LEN = 20


class TogetherExecutor(FaultyExecutor):
    """Ends a step once every replica has launched it."""

    def __init__(self, ranks: FakeExecutor, group: FakeLockstep, delays: Callable[[int], int]) -> None:
        super().__init__(ranks, delays=delays)
        self._group = group
        self._ended = 0

    def poll(self, timeout: float) -> list[StepResult]:
        if min(self._group.counts) <= self._ended:
            return []
        results = super().poll(timeout)
        self._ended += len(results)
        return results


class Replicas:
    def __init__(
        self, size: int, *, depth: int = 2, stages: int = 1, num_blocks: int = 16, delays: Sequence[int] = (0,)
    ) -> None:
        self.group = FakeLockstep(size)
        self.depth = depth
        self.outcomes = Outcomes()
        self.ranks = [FakeExecutor(num_blocks, 4, stages=min(stages, depth)) for _ in range(size)]
        self.cores = [
            EngineCore(
                TogetherExecutor(ranks, self.group, lambda step, i=i: delays[(step + i) % len(delays)]),  # type: ignore[misc]
                SchedulerLimits(8, 64, MAX_MODEL_LEN, stages=stages),
                block_size=4,
                prefix_caching=True,
                max_in_flight=depth,
                lockstep=self.group.peers[i],
            )
            for i, ranks in enumerate(self.ranks)
        ]
        self.placed: dict[int, int] = {}

    def add(self, replica: int, spec: EngineRequest) -> None:
        self.cores[replica].add(spec)
        self.placed[spec.seq] = replica
        self.outcomes.added(spec)

    def step(self, replica: int) -> None:
        """Drive an engine as its owner does: only if it has something to do."""
        if self.cores[replica].busy:
            self.outcomes.take(self.cores[replica].updates(0))

    def drain(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if not any(core.busy for core in self.cores):
                break
            for replica in range(len(self.cores)):
                self.step(replica)
        assert self.outcomes.open == []
        self.check_all_stop()

    def check_all_stop(self) -> None:
        assert not any(core.busy for core in self.cores), "the replicas never stop"
        counts = [len(ranks.plans) for ranks in self.ranks]
        assert counts == self.group.counts == [counts[0]] * len(counts)
        for core, ranks in zip(self.cores, self.ranks, strict=True):
            assert core.updates(0) == []
            assert ranks.known == set()
        assert [len(ranks.plans) for ranks in self.ranks] == counts, "the replicas launch steps without work"


def test_an_idle_replica_launches_as_many_steps_as_one_with_work() -> None:
    replicas = Replicas(2)
    spec = request(1, [1, 2, 3], 5)
    replicas.add(0, spec)
    replicas.step(0)
    assert replicas.group.counts == [2, 0]
    assert replicas.cores[1].busy
    replicas.step(1)
    assert replicas.group.counts == [2, 2]
    assert all(not plan.work and plan.lockstep for plan in replicas.ranks[1].plans)
    replicas.drain()
    assert replicas.outcomes.tokens[1] == alone(spec)
    assert all(plan.lockstep for plan in replicas.ranks[0].plans)


def test_an_idle_replica_has_no_more_plans_in_flight_than_another() -> None:
    replicas = Replicas(2, depth=3)
    replicas.add(0, request(1, [1, 2, 3], 9))
    replicas.group.peers[0].launched(9)  # as if it were far ahead
    for _ in range(3):
        replicas.step(1)
    assert replicas.ranks[1].most_in_flight <= 3


def test_replicas_without_work_stop() -> None:
    replicas = Replicas(3)
    replicas.check_all_stop()
    assert replicas.group.counts == [0, 0, 0]


def test_without_lockstep_only_the_last_plan_is_empty() -> None:
    ranks = FakeExecutor()
    core = EngineCore(ranks, SchedulerLimits(8, 64, 64), block_size=4, prefix_caching=True, max_in_flight=2)
    core.add(request(1, [1, 2, 3], 5))
    while core.busy:
        core.updates(0)
    assert not any(plan.lockstep for plan in ranks.plans)
    assert [bool(plan.work) for plan in ranks.plans] == [True] * 5 + [False]


@pytest.mark.parametrize("working", [True, False])
def test_a_replica_fails_with_the_failure_of_another(working: bool) -> None:
    replicas = Replicas(2)
    if working:
        replicas.add(0, request(1, [1, 2, 3], 9))
        replicas.step(0)
    replicas.group.failure = "another replica has failed: replica 1 at 10.0.0.7, process 77, has ended"
    assert replicas.cores[0].busy, "so that the failure is noticed"
    with pytest.raises(EngineError, match=r"replica 1 at 10\.0\.0\.7"):
        replicas.cores[0].updates(0)
    with pytest.raises(ClosedError, match="replica 1"):
        replicas.cores[0].updates(0)


def test_an_error_that_follows_from_another_replicas_failure_names_that_replica() -> None:
    """Our ranks miss its ranks before we hear of its failure."""
    group = FakeLockstep(2)

    class Deserted(FakeExecutor):
        def poll(self, timeout: float) -> list[StepResult]:
            group.failure = "another replica has failed: replica 1"
            raise EngineError("rank 0: all_to_all: connection closed")

    core = EngineCore(
        Deserted(),
        SchedulerLimits(8, 64, 64),
        block_size=4,
        prefix_caching=True,
        max_in_flight=2,
        lockstep=group.peers[0],
    )
    core.add(request(1, [1]))
    with pytest.raises(EngineError, match="replica 1") as found:
        core.updates(0)
    assert "connection closed" in str(found.value.__cause__)


class LockstepMachine(ReplicaMachine):
    """Requests of several replicas that are driven in any order, with steps that take longer on some of them."""

    @initialize(
        size=st.integers(2, 3),
        depth=st.integers(1, 3),
        stages=st.integers(1, 2),
        num_blocks=st.integers(5, 12),
        delays=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    )
    def start(self, size: int, depth: int, stages: int, num_blocks: int, delays: list[int]) -> None:
        self.replicas: Replicas = Replicas(size, depth=depth, stages=stages, num_blocks=num_blocks, delays=delays)

    @rule(
        where=st.integers(0, 2),
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=9),
        max_tokens=st.integers(1, 6),
        stop_ids=st.sets(st.integers(0, 6), max_size=1),
    )
    def add(self, where: int, prompt: list[int], max_tokens: int, stop_ids: set[int]) -> None:
        seq = len(self.replicas.outcomes.specs)
        where %= len(self.replicas.cores)
        self.replicas.add(where, request(seq, prompt, max_tokens, stop_ids=sorted(stop_ids)))

    @rule()
    def rest(self) -> None:
        self.replicas.drain()

    @invariant()
    def within_limits(self) -> None:
        if hasattr(self, "replicas"):
            replicas = self.replicas
            assert replicas.group.counts == [len(ranks.plans) for ranks in replicas.ranks]
            assert max(ranks.most_in_flight for ranks in replicas.ranks) <= replicas.depth
            assert max(replicas.group.counts) - min(replicas.group.counts) <= replicas.depth

    def teardown(self) -> None:
        if hasattr(self, "replicas"):
            self.replicas.drain()


TestLockstep = LockstepMachine.TestCase
TestLockstep.settings = settings(steady, max_examples=100, stateful_step_count=40)
