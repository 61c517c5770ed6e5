"""An engine over fake ranks that pauses, sleeps and wakes up gives the same tokens as one that always runs."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from engine.test_core import NGRAM, Engine
from engine.test_lockstep import Replicas
from shoal.activity import AWAKE, PARTS, PAUSED, Activity, ActivityState
from shoal.errors import CheckpointError
from shoal.wire.engine import Finish, ResetOutcome
from support.fakes import alone, request, steady

ASLEEP = Activity(ActivityState.ASLEEP, 1, PARTS)
NO_CACHE = Activity(ActivityState.ASLEEP, 1, ("kv_cache",))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_paused_engine_launches_nothing_and_resumes_with_the_same_tokens(depth: int) -> None:
    engine = Engine(depth=depth)
    spec = request(1, [1, 2, 3], 9)
    engine.add(spec)
    engine.step()
    engine.core.set_activity(PAUSED)
    engine.step()  # what was in flight
    launched, given = len(engine.ranks.plans), len(engine.outcomes.tokens[1])
    engine.add(request(2, [4, 5], 3))
    assert not engine.core.busy
    engine.step()
    assert (len(engine.ranks.plans), len(engine.outcomes.tokens[1])) == (launched, given)
    assert engine.core.stats().activity == PAUSED
    engine.core.set_activity(AWAKE)
    engine.drain()
    assert engine.outcomes.tokens[1] == alone(spec)


def test_requests_can_be_aborted_during_a_pause() -> None:
    engine = Engine()
    engine.add(request(1, [1, 2, 3], 9))
    engine.step()
    engine.core.set_activity(PAUSED)
    engine.abort(1)
    assert engine.core.busy, "the last updates are still to be taken"
    engine.step()
    assert engine.outcomes.finished[1].finish is Finish.ABORT
    assert not engine.core.busy
    engine.core.set_activity(AWAKE)
    engine.drain()


def test_a_sleeping_engine_holds_no_block_and_requests_resume_with_their_tokens() -> None:
    engine = Engine()
    specs = [request(seq, [seq, 2, 3, 4, 5], 9) for seq in range(3)]
    for spec in specs:
        engine.add(spec)
    for _ in range(4):
        engine.step()
    engine.core.set_activity(ASLEEP)
    engine.step()
    stats = engine.core.stats()
    assert engine.ranks.missing == set(PARTS)
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 3, stats.num_blocks)
    assert not engine.core.busy
    engine.core.set_activity(NO_CACHE)
    assert engine.ranks.missing == {"kv_cache"}
    engine.core.set_activity(AWAKE)
    engine.drain()
    assert [engine.outcomes.tokens[spec.seq] for spec in specs] == [alone(spec) for spec in specs]
    assert {engine.outcomes.finished[spec.seq].preemptions for spec in specs} == {1}


def test_an_engine_that_can_not_wake_up_stays_asleep() -> None:
    engine = Engine()
    engine.core.set_activity(ASLEEP)
    engine.ranks.refuses = "model.safetensors is gone"
    with pytest.raises(CheckpointError, match=r"model\.safetensors is gone"):
        engine.core.set_activity(AWAKE)
    assert engine.core.activity == ASLEEP
    assert engine.ranks.missing == set(PARTS)
    engine.ranks.refuses = ""
    engine.core.set_activity(AWAKE)
    spec = request(1, [1, 2, 3], 4)
    engine.add(spec)
    engine.drain()
    assert engine.outcomes.tokens[1] == alone(spec)


def test_a_forgotten_prefix_is_computed_again() -> None:
    engine = Engine()
    prompt = list(range(8))
    engine.add(request(1, prompt, 2))
    engine.drain()
    assert engine.core.reset_prefix_cache() == ResetOutcome(forgotten=2, held=0)
    for seq, cached in ((2, 0), (3, 7)):
        engine.add(request(seq, prompt, 2))
        engine.drain()
        assert engine.outcomes.finished[seq].cached_tokens == cached


@pytest.mark.parametrize("running", [False, True])
def test_running_requests_survive_a_reset_and_their_blocks_are_not_found(running: bool) -> None:
    engine = Engine()
    spec = request(1, list(range(8)), 9)
    engine.add(spec)
    for _ in range(4):
        engine.step()
    found = engine.core.reset_prefix_cache(running=running)
    assert found.forgotten >= 2
    assert (found.held > 0) == (not running)
    engine.add(request(2, list(range(8)), 2))
    engine.drain()
    assert engine.outcomes.tokens[1] == alone(spec)
    assert engine.outcomes.finished[1].preemptions == running
    if not running:
        assert engine.outcomes.finished[2].cached_tokens == 0


def test_a_paused_replica_takes_part_in_the_steps_of_its_lockstep() -> None:
    replicas = Replicas(2)
    replicas.add(0, request(1, [1, 2, 3], 5))
    replicas.add(1, request(2, [4, 5, 6], 5))
    replicas.cores[1].set_activity(PAUSED)
    while replicas.outcomes.open != [2]:
        replicas.step(0)
        replicas.step(1)
    assert not any(plan.work for plan in replicas.ranks[1].plans)
    replicas.cores[1].set_activity(AWAKE)
    replicas.drain()


class Restless(RuleBasedStateMachine):
    """An engine that pauses and sleeps at any time, over ranks that check every plan against what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(num_blocks=12, depth=2, speculative=NGRAM)
        self.count = 0

    @rule(length=st.integers(1, 8), most=st.integers(1, 9))
    def add(self, length: int, most: int) -> None:
        self.count += 1
        self.engine.add(request(self.count, [self.count % 3] * length, most))

    @rule()
    def step(self) -> None:
        self.engine.step()

    @rule(activity=st.sampled_from([AWAKE, PAUSED, ASLEEP, NO_CACHE]))
    def set_activity(self, activity: Activity) -> None:
        self.engine.core.set_activity(activity)
        assert self.engine.ranks.missing == set(activity.missing)

    @rule(running=st.booleans())
    def reset(self, running: bool) -> None:
        self.engine.core.reset_prefix_cache(running=running)

    @rule(back=st.integers(0, 3))
    def abort(self, back: int) -> None:
        if self.count > back:
            self.engine.abort(self.count - back)

    def teardown(self) -> None:
        self.engine.core.set_activity(AWAKE)
        self.engine.drain()
        stats = self.engine.core.stats()
        assert sum(stats.accepted_by_position) == stats.accepted_tokens
        assert list(stats.accepted_by_position) == sorted(stats.accepted_by_position, reverse=True)


TestRestless = Restless.TestCase
TestRestless.settings = settings(steady, max_examples=150, stateful_step_count=30)
