"""A fleet of engines of a few lines, on a clock of its own: whatever dies whenever, every request has one end."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.cluster.fleet import About, Fleet
from shoal.cluster.limits import FleetLimits
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.errors import CheckpointError, ConfigError, EngineError, RequestError, ShoalError
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest, EngineStats, Finish, RefusalKind, SeqUpdate
from shoal.wire.fleet import Operation
from support.fake_replica import STATS, FakeReplica
from support.fakes import FakeClock, Outcomes, request, steady

NEVER = 10**9
LONG = 300  # tokens: more than are drawn


class Quiet:
    """A channel on which nothing comes."""

    backlog = False

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd


QUIET = Quiet()


class FakeMember(FakeReplica):
    """Takes `polls` looks to become ready, and as many to leave."""

    def __init__(self, number: int, generation: int = 0, polls: int = 0) -> None:
        super().__init__(number, seed=number)
        self.number = number
        self.generation = generation
        self.polls = polls
        self.host, self.pid = "elsewhere", 4711
        self.leaving = False
        self.error: ShoalError | None = None  # at its start
        self.may_wait = False  # may somebody wait for its end?
        self.holds = STATS.max_model_len  # tokens of a request

    @property
    def channel(self) -> Any:
        assert not self.closed, "nobody listens to one that was ended"
        return QUIET

    def ready(self, timeout: float) -> EngineStats | None:
        assert timeout == 0, "whoever drives a fleet waits for all of it"
        self._check_alive()
        if self.error is not None:
            raise self.error
        self.polls -= 1
        return replace_fields(STATS, max_model_len=self.holds) if self.polls < 0 else None

    @property
    def has_ended(self) -> bool:
        self.polls -= 1
        return self.closed or bool(self.dead) or (self.leaving and self.polls < 0)

    def say_goodbye(self) -> None:
        self.leaving = True

    def end(self, deadline: float) -> None:
        assert self.may_wait, "nobody waits for the end of one replica while there are others"
        super().end(deadline)


class Recorded:
    """What a recorder is told: one beginning and one end of each."""

    def __init__(self) -> None:
        self.begun: set[int] = set()
        self.ends: set[int] = set()

    def added(self, request: EngineRequest) -> None:
        assert request.arrival
        assert request.seq not in self.begun
        self.begun.add(request.seq)

    def dealt(self, seq: int, replica: int) -> None:
        assert seq in self.begun - self.ends

    def updated(self, replica: int, update: SeqUpdate) -> None:
        assert update.seq in self.begun - self.ends
        if update.finish is not None:
            self.ends.add(update.seq)

    def stopped(self, seq: int) -> None:
        assert seq in self.begun - self.ends

    def ended(self, update: SeqUpdate) -> None:
        assert update.seq in self.begun - self.ends
        self.ends.add(update.seq)


class World:
    """A fleet, and all that it has started."""

    def __init__(
        self,
        local: int = 2,
        *,
        awaited: Sequence[int] = (),
        elsewhere: Sequence[int] = (),
        together: bool = False,
        most: int = 3,
        polls: Callable[[], int] = lambda: 0,
        fails: Callable[[int, int], Exception | None] = lambda number, generation: None,
        holds: dict[int, int] | None = None,
        **limits: Any,
    ) -> None:
        self.clock = FakeClock()
        self.members: list[FakeMember] = []  # in the order of their starts
        self.outcomes = Outcomes()
        self.recorded = Recorded()
        self.deaths: Counter[int] = Counter()
        self.ends_of_rooms = 0
        self.polls, self.fails, self.holds = polls, fails, holds or {}
        bounds: dict[str, Any] = {
            "max_queued": 1000,
            "max_wait": None,
            "timeout": None,
            "max_restarts": 20,
            "start_timeout": 600.0,
            **limits,
        }
        self.fleet = Fleet(
            self._launch,
            lambda stats: ReplicaCapacity(most, 10**6, 4, 100),
            about=About("model", 1, 1),
            limits=FleetLimits(**bounds),
            local=range(local),
            awaited=awaited,
            elsewhere=elsewhere,
            together=together,
            recorder=self.recorded,
            clock=self.clock,
        )

    def _launch(self, number: int, generation: int) -> FakeMember:
        return self.launch(number, generation)

    def launch(self, number: int, generation: int) -> FakeMember:
        error = self.fails(number, generation)
        if isinstance(error, OSError):
            raise error
        self.members.append(FakeMember(number, generation, self.polls()))
        self.members[-1].holds = self.holds.get(number, STATS.max_model_len)
        if isinstance(error, ShoalError):
            self.members[-1].error = error
        return self.members[-1]

    def member(self, number: int) -> FakeMember:
        """The latest of a number."""
        return [member for member in self.members if member.number == number][-1]

    @property
    def alive(self) -> list[FakeMember]:
        return [member for member in self.members if not member.dead and not member.closed]

    def kill(self, member: FakeMember) -> None:
        member.dead = "was killed by SIGKILL"
        self.deaths.update(member.held.keys())

    def state(self, number: int) -> str:
        return next((each.state for each in self.fleet.status().replicas if each.number == number), "")

    def add(self, spec: EngineRequest) -> None:
        self.outcomes.added(spec)
        self.fleet.add(spec)

    def step(self, seconds: float = 0.0) -> list[SeqUpdate]:
        self.clock.now += seconds
        updates = self.fleet.updates(0)
        for update in updates:
            assert bool(update.error) == (update.refusal is not RefusalKind.NONE), update
            if update.error:
                assert update.finish is Finish.ABORT
                self.outcomes.may_abort.add(update.seq)
        self.outcomes.take(updates)
        return updates

    def settle(self, rounds: int = 20, seconds: float = 0.0) -> None:
        for _ in range(rounds):
            self.step(seconds)

    def refusals(self) -> dict[int, RefusalKind]:
        return {seq: update.refusal for seq, update in self.outcomes.finished.items()}

    def error(self, seq: int) -> str:
        return self.outcomes.finished[seq].error

    def finish(self, seconds: float = 1.0) -> None:
        for _ in range(400):
            if not self.outcomes.open:
                break
            self.step(seconds)
        assert not self.outcomes.open, "a request has no end"
        self.fleet.audit()
        assert self.recorded.begun == self.recorded.ends == set(self.outcomes.specs)

    def close(self) -> None:
        for member in self.members:
            member.may_wait = True
        self.fleet.close()
        self.fleet.close()
        assert all(member.closed for member in self.members)


@contextmanager
def world(local: int = 2, **options: Any) -> Iterator[World]:
    found = World(local, **options)
    try:
        yield found
    finally:
        found.close()


def pinned(seq: int, replica: int, max_tokens: int = 4) -> EngineRequest:
    return replace_fields(request(seq, [seq, 1], max_tokens), replica=replica)


# --- whatever happens --------------------------------------------------------------------------------------------


OPERATIONS = [
    Operation("pause", mode="keep"),
    Operation("pause", mode="wait"),
    Operation("pause", mode="abort"),
    Operation("resume"),
    Operation("sleep", mode="keep"),
    Operation("sleep", mode="abort", level=2),
    Operation("wake_up"),
    Operation("wake_up", tags=("weights",)),
    Operation("reset_prefix_cache"),
]


class Chaos:
    """Does what is drawn."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.together = data.draw(st.booleans(), "together")
        self.awaited = [] if self.together else data.draw(st.sampled_from([[], [2], [2, 3]]), "awaited")
        self.limits: dict[str, Any] = {
            "max_queued": data.draw(st.sampled_from([0, 2, 1000]), "max_queued"),
            "max_wait": data.draw(st.sampled_from([None, 3.0]), "max_wait"),
            "timeout": data.draw(st.sampled_from([None, 20.0]), "timeout"),
            "max_restarts": data.draw(st.sampled_from([0, 2, 50]), "max_restarts"),
        }
        self.world = World(
            data.draw(st.integers(1, 3), "local"),
            awaited=self.awaited,
            together=self.together,
            most=data.draw(st.integers(1, 4), "most"),
            polls=lambda: data.draw(st.integers(0, 3), "polls"),
            fails=self.fails,
            **self.limits,
        )
        self.sick = False
        self.scaled = self.drained = self.slept = self.aborts = False
        self.seqs = self.asked = 0
        self.told: list[Any] = []  # of operations, how they ended

    def fails(self, number: int, generation: int) -> Exception | None:
        if not getattr(self, "sick", False) or self.data.draw(st.integers(0, 5), "fails"):
            return None
        return self.data.draw(st.sampled_from([OSError("no memory"), EngineError("no"), CheckpointError("bad")]), "why")

    def act(self) -> None:
        often = [self.add, self.add, self.add, self.wait, self.wait]
        actions = [*often, self.kill, self.abort, self.scale, self.arrive, self.operate]
        self.data.draw(st.sampled_from(actions), "action")()

    def operate(self) -> None:
        wanted = self.data.draw(st.sampled_from(OPERATIONS), "operation")
        self.slept |= wanted.verb == "sleep"
        if wanted.mode == "abort" and wanted.verb in ("pause", "sleep"):
            self.aborts = True
        if self.aborts:  # those that come before it begins are aborted as well
            self.world.outcomes.may_abort.update(self.world.outcomes.specs)
        self.asked += 1
        self.world.fleet.operate(wanted, self.told.append)

    def add(self) -> None:
        draw, now = self.data.draw, self.world.clock.now
        prompt = draw(st.lists(st.integers(0, 5), min_size=1, max_size=9), "prompt")
        spec = request(
            self.seqs,
            prompt,
            draw(st.integers(1, 30), "length"),
            stop_ids=draw(st.sampled_from([[], [3]]), "stop"),
            deadline=draw(st.sampled_from([None, None, now + 5, now - 1]), "deadline"),
        )
        self.seqs += 1
        self.world.add(replace_fields(spec, replica=draw(st.sampled_from([-1, -1, -1, 0, 1, 2, 7]), "replica")))

    def kill(self) -> None:
        if self.world.alive:
            self.world.kill(self.data.draw(st.sampled_from(self.world.alive), "victim"))

    def abort(self) -> None:
        if self.world.outcomes.open:
            seq = self.data.draw(st.sampled_from(self.world.outcomes.open), "aborted")
            self.world.outcomes.may_abort.add(seq)
            self.world.fleet.abort([seq, 999, seq])

    def wait(self) -> None:
        self.world.step(self.data.draw(st.sampled_from([0.0, 0.3, 2.0, 40.0]), "seconds"))

    def scale(self) -> None:
        try:
            self.world.fleet.scale(self.data.draw(st.integers(1, 4), "count"))
            self.scaled = True
        except (ConfigError, EngineError, CheckpointError):
            assert self.together or self.world.fleet.fatal

    def arrive(self) -> None:
        if self.awaited:
            member = FakeMember(self.data.draw(st.sampled_from(self.awaited), "arrival"))
            self.world.members.append(member)
            self.world.fleet.arrive(member.number, member)

    def check(self) -> None:
        for update in self.world.outcomes.finished.values():
            self.check_end(update)
        running = [m for m in self.world.alive if self.world.state(m.number) == "ready" and not m.leaving]
        assert not self.together or len({member.generation for member in running}) <= 1

    def check_end(self, update: SeqUpdate) -> None:
        spec = self.world.outcomes.specs[update.seq]
        pin = spec.replica >= 0
        match update.refusal:
            case RefusalKind.INVALID:
                assert pin
            case RefusalKind.FULL:
                assert self.limits["max_queued"] < 1000
            case RefusalKind.LATE:
                assert spec.deadline or self.limits["max_wait"] or self.limits["timeout"]
            case RefusalKind.FAILED:
                assert self.world.deaths[update.seq] >= 3
            case RefusalKind.LOST:
                assert self.world.fleet.fatal or pin
            case RefusalKind.CLOSING:
                assert self.drained
            case RefusalKind.ASLEEP:
                assert self.slept

    def end(self) -> None:
        """Nothing dies any more: all that can end, ends; who waits for another host is told when it comes."""
        self.sick = False
        self.asked += 1
        self.world.fleet.operate(Operation("wake_up"), self.told.append)
        for number in self.awaited:
            if self.world.state(number) == "awaited":
                self.world.members.append(FakeMember(number))
                self.world.fleet.arrive(number, self.world.members[-1])
        if self.data.draw(st.booleans(), "drain"):
            self.drained = True
            self.world.fleet.drain()
            self.add()
        self.world.finish()
        self.check()


@given(data=st.data())
@settings(steady, max_examples=300)
def test_whatever_dies_whenever_every_request_has_one_end(data: st.DataObject) -> None:
    chaos = Chaos(data)
    try:
        chaos.sick = True
        for _ in range(data.draw(st.integers(1, 40), "steps")):
            chaos.act()
            chaos.world.fleet.audit()
            chaos.check()
        chaos.end()
    finally:
        chaos.world.close()


@given(data=st.data())
@settings(steady, max_examples=40)
def test_deaths_with_pauses_between_them_cost_nothing(data: st.DataObject) -> None:
    """Restarts without a bound and requests without a deadline: all outputs are those of undisturbed twins."""
    with world(data.draw(st.integers(1, 3)), together=data.draw(st.booleans()), max_restarts=NEVER) as found:
        found.settle(3)
        for seq in range(data.draw(st.integers(1, 8))):
            found.add(request(seq, [seq % 3, 1], data.draw(st.integers(60, 90))))
        for _ in range(data.draw(st.integers(1, 6))):
            found.settle(40, 1.0)  # at least 16 tokens for each that runs
            if found.alive:
                found.kill(data.draw(st.sampled_from(found.alive)))
        found.finish()
        assert not any(found.refusals().values())


# --- lives --------------------------------------------------------------------------------------------------------


def test_one_that_was_of_use_is_started_again_at_once() -> None:
    with world(1) as found:
        found.add(request(0, [1], 50))
        found.settle(5)
        found.kill(found.members[0])
        found.settle(3)
        assert len(found.members) == 2
        (state,) = found.fleet.status().replicas
        assert (state.restarts, state.cause) == (1, "replica 0 was killed by SIGKILL")
        assert found.fleet.status().replays == 1
        found.finish()


def test_one_that_is_of_no_use_waits_longer_each_time_and_is_given_up() -> None:
    with world(1) as found:
        pauses = []
        for life in range(1, 6):
            found.settle(3)
            assert len(found.members) == life
            found.kill(found.members[-1])
            found.settle(2)
            begun = found.clock.now
            while len(found.members) == life and found.clock.now - begun < 60:
                found.step(0.25)
            pauses.append(found.clock.now - begun)
        assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
        assert found.state(0) == "failed"
        assert "was killed by SIGKILL" in str(found.fleet.fatal)
        found.add(request(0, [1]))
        found.step()
        assert found.refusals() == {0: RefusalKind.LOST}
        with pytest.raises(EngineError, match="SIGKILL"):
            _ = found.fleet.started


def test_a_life_that_ends_before_it_is_ready_is_of_no_use_whatever_the_one_before_did() -> None:
    with world(1) as found:
        found.add(request(0, [1], 500))
        found.settle(40)
        found.polls = lambda: NEVER
        found.kill(found.member(0))
        found.settle(2)
        for life in range(2, 6):
            assert len(found.members) == life
            found.kill(found.member(0))
            found.settle(2)
            assert len(found.members) == life, "not at once"
            found.step(40)
        found.kill(found.member(0))
        found.settle(2)
        assert "replica 0 was killed" in found.error(0)


def test_restarts_within_an_hour_are_bounded() -> None:
    with world(1, max_restarts=2) as found:
        for seq in range(3):
            found.add(request(seq, [1], 50))
            found.settle(60)
            found.add(request(100 + seq, [2], 50))
            found.settle(30)
            found.kill(found.member(0))
            found.settle(3)
        assert found.state(0) == "failed"
        assert len(found.members) == 3


def test_one_that_was_never_ready_is_not_started_again() -> None:
    with world(1, polls=lambda: 5) as found:
        found.add(request(0, [1]))
        found.step()
        found.kill(found.members[0])
        found.settle(5, 100.0)
        assert len(found.members) == 1
        assert found.refusals() == {0: RefusalKind.LOST}


def test_what_the_user_must_mend_is_told_as_such() -> None:
    with world(2, fails=lambda number, _: CheckpointError("no weights") if number else EngineError("lost")) as found:
        found.settle(2)
        with pytest.raises(CheckpointError, match="no replica is left: replica 0: lost; replica 1: no weights"):
            _ = found.fleet.started


def test_one_that_can_not_be_started_leaves_the_others_alone() -> None:
    with world(2, fails=lambda number, _: None if number else OSError(11, "no processes")) as found:
        found.settle(2)
        assert found.fleet.fatal is None
        with pytest.raises(EngineError, match=r"replica 0 can't be started: .*no processes"):
            _ = found.fleet.started
        found.add(request(0, [1]))
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE}


def test_one_that_takes_too_long_to_start_is_ended() -> None:
    with world(2, polls=lambda: NEVER, start_timeout=10.0) as found:
        found.members[1].polls = 0
        found.settle(3, 5.0)
        assert found.members[0].closed
        assert [found.state(0), found.state(1)] == ["failed", "ready"]
        assert "was not ready within 10 s" in found.fleet.status().replicas[0].cause


def test_a_fleet_in_which_all_were_given_up_rests() -> None:
    """Whoever waits for the next start would wait for nothing, again and again."""
    with world(2, together=True) as found:
        found.settle(3)
        found.fails = lambda number, _: CheckpointError("gone") if number else None
        found.kill(found.member(0))
        for _ in range(5):
            found.settle(3, 30.0)
        assert found.fleet.fatal is not None
        found.kill(found.member(0))
        found.settle(3, 30.0)
        assert found.fleet.pause() > 100


def test_counters_go_on_over_lives() -> None:
    with world(1) as found:
        found.add(request(0, [1], 60))
        found.settle(30)
        found.members[0].snapshot = replace_fields(STATS, generated_tokens=30, running=1, iteration_tokens=(1, 2))
        assert found.fleet.status().replicas[0].stats == found.members[0].snapshot
        found.kill(found.members[0])
        found.settle(5)
        found.members[1].snapshot = replace_fields(STATS, generated_tokens=4, iteration_tokens=(0, 1, 1))
        (state,) = found.fleet.status().replicas
        assert state.stats is not None
        assert (state.stats.generated_tokens, state.stats.running) == (34, 0)
        assert state.stats.iteration_tokens == (1, 3, 1)


# --- replicas that compute together --------------------------------------------------------------------------------


def test_those_that_compute_together_start_again_together() -> None:
    with world(3, together=True) as found:
        for seq in range(6):
            found.add(request(seq, [seq], 60))
        found.settle(30)
        found.kill(found.members[1])
        found.settle(3)
        assert [member.generation for member in found.members] == [0, 0, 0, 1, 1, 1]
        assert all(member.closed for member in found.members[:3])
        found.finish()
        assert not any(found.refusals().values())


def test_one_that_ends_at_its_start_takes_those_along_that_start_with_it() -> None:
    with world(2, together=True) as found:
        found.add(request(0, [1], 100))
        found.settle(40)
        found.polls = lambda: 4
        found.kill(found.member(0))
        found.settle(2)
        found.kill(found.member(1))
        found.settle(3)
        assert [member.generation for member in found.members[:4]] == [0, 0, 1, 1]
        assert found.members[2].closed
        found.finish()
        assert found.member(0).generation == found.member(1).generation == 2


# --- who is taken, and how long they wait ----------------------------------------------------------------------------


@pytest.mark.parametrize(("replicas", "replica", "most"), [(1, -1, 3), (2, -1, 4), (2, 1, 3)])
def test_what_can_never_be_taken_is_told_so(replicas: int, replica: int, most: int) -> None:
    """Each replica holds one request, and two may wait."""
    with world(replicas, most=1, max_queued=2) as found:
        found.settle(replicas + 1)
        for seq, outputs in enumerate((most + 1, most)):
            found.add(replace_fields(request(seq, [seq]), outputs=outputs, replica=replica))
        found.step()
        assert found.refusals() == {0: RefusalKind.INVALID}
        assert f"makes {most + 1} outputs, and {most} can be taken at a time" in found.error(0)
        found.finish()


def test_before_a_replica_was_ready_nobody_knows_what_is_too_many() -> None:
    with world(1, most=1, max_queued=2) as found:
        found.add(replace_fields(request(0, [0]), outputs=9))
        assert not found.refusals()
        found.finish()


def test_beyond_the_queue_nobody_is_taken_and_nobody_is_disturbed() -> None:
    with world(1, most=1, max_queued=2) as found:
        found.settle(2)
        for seq in range(6):
            found.add(request(seq, [seq]))
        found.step()
        refused = {seq for seq, refusal in found.refusals().items() if refusal is RefusalKind.FULL}
        assert refused == {3, 4, 5}
        assert "2 requests wait already (--max-queued-requests)" in found.error(3)
        found.finish()


def test_those_that_are_refused_do_not_keep_the_others_waiting() -> None:
    with world(1, most=1, max_queued=0) as found:
        found.settle(2)
        found.add(request(0, [1], 5))
        for seq in range(1, 60):
            found.add(request(seq, [seq]))
            found.step()
        assert found.outcomes.finished[0].finish is Finish.LENGTH


def test_a_request_waits_so_long_for_a_replica_and_no_longer() -> None:
    with world(1, most=1, max_wait=3.0) as found:
        found.settle(2)
        found.add(request(0, [1], LONG))
        found.add(request(1, [2]))
        found.settle(2, 1.0)
        found.add(request(2, [2]))
        found.settle(2, 0.5)
        assert found.refusals() == {1: RefusalKind.LATE}
        assert "waited 3 s for a replica (--max-queue-wait)" in found.error(1)


def test_one_that_a_replica_has_had_is_not_late_for_it() -> None:
    with world(1, max_wait=3.0) as found:
        found.add(request(0, [1], 60))
        found.settle(20)
        found.polls = lambda: 10
        found.kill(found.member(0))
        found.finish(1.0)
        assert found.refusals() == {0: RefusalKind.NONE}


@pytest.mark.parametrize("options", [{"timeout": 5.0}, {}])
def test_a_request_ends_at_its_deadline_wherever_it_is(options: dict[str, float]) -> None:
    with world(1, most=1, **options) as found:
        deadline = None if options else found.clock.now + 5
        found.settle(2)
        for seq in range(2):
            found.add(request(seq, [seq], LONG, deadline=deadline))
        found.settle(4, 1.0)
        assert not found.refusals()
        found.settle(2, 0.5)
        assert found.refusals() == {0: RefusalKind.LATE, 1: RefusalKind.LATE}
        found.settle(2)
        assert not found.members[0].held, "it was told"
        assert all(spec.deadline is None for spec in found.members[0].added)


def test_nothing_is_kept_of_those_that_ended_long_before_their_time() -> None:
    with world(1, timeout=1e6, max_wait=1e6) as found:
        found.add(request(0, [1], LONG))
        for seq in range(1, 2000):
            found.add(request(seq, [1], 1))
            while seq in found.outcomes.open:
                found.step()
        assert found.fleet.num_timers < 300


def test_one_that_drains_takes_nothing_new() -> None:
    with world(1) as found:
        found.add(request(0, [1]))
        found.fleet.drain()
        found.add(request(1, [1]))
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE, 1: RefusalKind.CLOSING}
        assert not found.fleet.status().accepting
        assert [spec.seq for spec in found.members[0].added] == [0]


def test_a_number_that_is_in_use() -> None:
    with world(1) as found:
        found.add(request(0, [1], 50))
        with pytest.raises(RequestError, match="request 0 exists already"):
            found.fleet.add(request(0, [2]))
        found.fleet.drain()
        with pytest.raises(RequestError, match="request 0 exists already"):
            found.fleet.add(request(0, [2]))
        found.finish()


class Deadly(FakeMember):
    def updates(self, timeout: float) -> list[SeqUpdate]:
        if 0 in self.held:
            self.dead = "was killed by SIGSEGV"
        return super().updates(timeout)


def test_a_request_that_kills_ends_alone_after_three_deaths() -> None:
    with world(2, most=1) as found:
        launch = found.launch

        def deadly(number: int, generation: int) -> FakeMember:
            member = launch(number, generation)
            member.__class__ = Deadly
            return member

        found.launch = deadly  # type: ignore[method-assign]
        for member in found.members:
            member.__class__ = Deadly
        for seq in range(6):
            found.add(request(seq, [seq], 9))
        found.finish()
        assert {seq for seq, refusal in found.refusals().items() if refusal} == {0}
        assert found.refusals()[0] is RefusalKind.FAILED
        assert "3 replicas failed one after the other while they had this request" in found.error(0)
        assert found.fleet.fatal is None


# --- requests that name their replica ---------------------------------------------------------------------------------


def test_one_that_names_a_replica_waits_for_it() -> None:
    with world(2) as found:
        found.settle(2)
        found.add(request(9, [1], 40))
        found.add(pinned(0, 1, 60))
        found.settle(30)
        found.polls = lambda: 30
        found.kill(found.member(1))
        found.settle(5)
        assert found.outcomes.open
        assert found.state(1) == "starting"
        found.finish()
        assert [spec.seq for spec in found.members[0].added] == [9]
        assert not any(found.refusals().values())


def test_one_that_names_a_replica_that_never_was() -> None:
    with world(2) as found:
        found.add(pinned(0, 5))
        found.finish()
        assert found.refusals() == {0: RefusalKind.INVALID}
        assert found.error(0) == "there is no replica 5; known are 0, 1"


def test_one_that_names_a_replica_that_does_not_come_back() -> None:
    with world(2, max_restarts=0) as found:
        found.settle(2)
        found.add(pinned(0, 1, 60))
        found.settle(5)
        found.kill(found.member(1))
        found.settle(5)
        found.add(pinned(1, 1))
        found.finish()
        assert found.refusals() == {0: RefusalKind.LOST, 1: RefusalKind.LOST}
        assert "is not started again" in found.error(0)
        assert "was killed by SIGKILL" in found.error(1)


def test_one_that_names_a_replica_that_is_taken_out() -> None:
    with world(2) as found:
        found.settle(2)
        found.add(pinned(0, 1, LONG))
        found.settle(3)
        found.fleet.scale(1)
        found.add(pinned(1, 1))
        found.finish()
        assert found.refusals() == {0: RefusalKind.LOST, 1: RefusalKind.INVALID}


# --- more and fewer ------------------------------------------------------------------------------------------------


def test_replicas_are_added_and_taken_out_under_load() -> None:
    with world(2, polls=lambda: 2, most=2) as found:
        for seq in range(30):
            found.add(request(seq, [seq % 5], 20))
        for count in (4, 1, 3, 2):
            found.settle(8)
            found.fleet.scale(count)
        found.finish()
        found.settle(20)
        assert not any(found.refusals().values())
        assert [each.state for each in found.fleet.status().replicas] == ["ready"] * 2


def test_one_that_leaves_is_seen_to_and_its_end_is_not_waited_for() -> None:
    with world(2) as found:
        found.settle(2)
        leaving = found.member(1)
        leaving.polls = NEVER
        found.fleet.scale(1)
        found.settle(3, 1.0)
        assert found.state(1) == "leaving"
        assert leaving.leaving
        assert not leaving.closed
        found.fleet.scale(2)
        found.settle(3)
        assert found.state(2) == "ready", "its number is still taken"
        found.settle(3, 5.0)
        assert leaving.closed
        assert found.state(1) == ""


def test_the_number_of_those_that_compute_together_stays() -> None:
    with world(2, together=True) as found:
        found.fleet.scale(2)
        with pytest.raises(ConfigError, match="their number stays as it is"):
            found.fleet.scale(3)
        with pytest.raises(ConfigError, match="at least one"):
            found.fleet.scale(0)


def test_those_that_failed_make_room_for_new_ones() -> None:
    with world(2, max_restarts=0) as found:
        found.settle(2)
        found.kill(found.member(1))
        found.settle(3)
        assert found.state(1) == "failed"
        found.fleet.scale(2)
        found.settle(3)
        assert [found.state(0), found.state(1)] == ["ready", "ready"]
        assert found.fleet.status().replicas[1].restarts == 0


def test_added_ones_take_no_number_of_another_host() -> None:
    with world(1, elsewhere=[1, 2]) as found:
        found.settle(2)
        found.fleet.scale(3)
        found.settle(2)
        assert [found.state(number) for number in (0, 3, 4)] == ["ready"] * 3
        found.fleet.scale(1)
        found.settle(3)
        found.fleet.scale(2)
        found.settle(2)
        assert [each.number for each in found.fleet.status().replicas if each.state == "ready"] == [0, 3]


# --- other hosts ----------------------------------------------------------------------------------------------------


def test_those_of_other_hosts_are_awaited_again_and_again() -> None:
    with world(0, awaited=[0, 1]) as found:
        found.add(request(0, [1], 60))
        found.settle(3)
        assert [found.state(0), found.state(1)] == ["awaited", "awaited"]
        assert not found.fleet.started
        for life in range(3):
            member = FakeMember(1, life, polls=2)
            found.members.append(member)
            found.fleet.arrive(1, member)
            found.settle(30)
            assert found.fleet.started
            assert (found.fleet.status().replicas[1].host, found.fleet.status().replicas[1].pid) == ("elsewhere", 4711)
            if life < 2:
                found.kill(member)
                found.settle(3)
                assert found.state(1) == "awaited"
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE}


def test_what_another_hosts_replica_drew_in_an_earlier_life_is_no_use_later() -> None:
    """Those that compute together end together; one that has drawn since is all that spares them the pause."""
    with world(1, awaited=[1], together=True) as found:
        pauses: list[float] = []
        for life in range(3):
            member = FakeMember(1, life)
            found.members.append(member)
            found.fleet.arrive(1, member)
            found.settle(4)
            if life == 0:
                found.add(pinned(0, 1, 5))
                found.finish()
            found.kill(member)
            found.kill(found.member(0))
            found.settle(1)
            pauses.append(found.fleet.pause())
            found.settle(3, 1.0)
        assert pauses[0] == 0
        assert pauses[2] > 0


def test_one_that_nobody_awaits_is_sent_away() -> None:
    with world(1, awaited=[1]) as found:
        found.settle(2)
        strangers = [FakeMember(7), FakeMember(0)]
        found.members += strangers
        for stranger in strangers:
            found.fleet.arrive(stranger.number, stranger)
        found.settle(3, 3.0)
        assert all(stranger.closed for stranger in strangers)
        assert not found.members[0].closed


def test_one_that_was_cut_off_and_is_back_is_counted_once() -> None:
    with world(0, awaited=[0]) as found:
        for generated, pid in [(10, 1), (25, 1), (30, 1), (5, 2), (8, 2)]:
            member = FakeMember(0)
            member.pid = pid
            found.members.append(member)
            found.fleet.arrive(0, member)
            found.settle(3)
            member.snapshot = replace_fields(STATS, generated_tokens=generated)
            stats = found.fleet.status().replicas[0].stats
            assert stats is not None
            assert stats.generated_tokens == (generated if pid == 1 else 30 + generated)
            found.kill(member)
            found.settle(3)


# --- how long requests may be -----------------------------------------------------------------------------------------


def test_requests_are_cut_to_what_all_replicas_hold() -> None:
    """Whenever they come."""
    with world(2, polls=iter([2, 6]).__next__, holds={0: 24, 1: 20}, max_model_len=100) as found:
        early, too_long = request(0, [1] * 5, 50), request(1, [1] * 20, 1)
        for spec in (early, too_long):
            found.fleet.add(spec)
        updates = found.fleet.updates(0)
        for _ in range(4):
            updates += found.fleet.updates(0)
            assert not found.members[0].added, "one that starts with it may hold less"
        for _ in range(9):
            updates += found.fleet.updates(0)
        assert found.fleet.status().max_model_len == 20
        found.fleet.add(request(2, [1] * 5, 50))
        found.fleet.add(request(3, [1] * 5, 6))
        found.fleet.add(request(4, [1] * 20))
        found.fleet.audit()
        for _ in range(40):
            updates += found.fleet.updates(0)
        lengths = {spec.seq: spec.max_tokens for member in found.members for spec in member.added}
        assert lengths == {0: 15, 2: 15, 3: 6}
        ends = {update.seq: update for update in updates if update.finish is not None}
        assert {seq: end.refusal for seq, end in ends.items() if end.error} == {
            1: RefusalKind.INVALID,
            4: RefusalKind.INVALID,
        }
        assert (
            "this model's maximum context length is 20 tokens; the prompt has 20, and an output needs one"
            in ends[1].error
        )
        found.fleet.audit()


def test_one_that_holds_what_was_planned_waits_for_nobody() -> None:
    with world(2, polls=iter([0, NEVER]).__next__, holds={0: 100}, max_model_len=100) as found:
        found.add(request(0, [1]))
        found.finish()


def test_one_that_is_added_takes_nobody_out_of_service_while_it_starts() -> None:
    with world(1, polls=iter([0, 5]).__next__) as found:
        found.settle(2)
        assert found.fleet.started
        found.fleet.scale(2)
        for _ in range(3):
            assert found.fleet.started
            found.settle(1)
        assert [found.state(0), found.state(1)] == ["ready", "starting"]
        found.settle(9)
        found.kill(found.member(1))
        found.settle(1)
        assert not found.fleet.started, "it was up, and is not"


def test_an_added_replica_that_holds_less_is_not_taken_in() -> None:
    with world(1, holds={0: 100, 1: 60}, max_model_len=100) as found:
        found.settle(2)
        assert found.fleet.started
        found.fleet.scale(2)
        found.add(request(0, [1] * 50, 50))
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE}
        (first, second) = found.fleet.status().replicas
        assert (first.state, second.state) == ("ready", "failed")
        assert (
            "holds requests of 60 tokens, but 100 are served: start the server with --max-model-len 60" in second.cause
        )
        assert found.members[1].closed
        assert not found.members[1].added
        assert found.fleet.started, "what was up once is not undone by one that was added"


def test_an_arrival_that_holds_less_is_sent_away() -> None:
    with world(1, awaited=[1], holds={0: 100}, max_model_len=100) as found:
        found.settle(2)
        member = FakeMember(1)
        member.holds = 99
        found.members.append(member)
        found.fleet.arrive(1, member)
        found.settle(3)
        assert member.leaving
        assert found.state(1) == "awaited"


# --- silence ---------------------------------------------------------------------------------------------------------


class Hanging(FakeMember):
    """Takes requests, and says nothing."""

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._check_alive()
        return []


def test_one_that_has_requests_and_says_nothing_is_lost() -> None:
    with world(1, answer_timeout=10.0) as found:
        found.settle(2)
        found.members[0].__class__ = Hanging
        found.settle(40, 1.0)
        assert found.state(0) == "ready", "it has nothing to say"
        found.add(request(0, [1]))
        found.settle(9, 1.0)
        assert len(found.members) == 1
        found.finish()
        assert len(found.members) == 2
        assert found.members[0].closed
        assert "replica 0 has 1 requests and has said nothing for" in found.fleet.status().replicas[0].cause
        assert found.refusals() == {0: RefusalKind.NONE}


def test_time_in_which_the_head_was_stopped_is_held_against_nobody() -> None:
    with world(1, answer_timeout=10.0) as found:
        found.settle(2)
        found.members[0].__class__ = Hanging
        found.add(request(0, [1]))
        found.settle(2, 1.0)
        found.step(100_000.0)
        found.members[0].__class__ = FakeMember
        found.finish()
        assert len(found.members) == 1


# --- what lives leave behind ------------------------------------------------------------------------------------------


def test_a_replica_that_was_ready_for_long_was_of_use() -> None:
    with world(1) as found:
        for life in range(1, 9):
            found.settle(3)
            assert len(found.members) == life
            found.step(100_000.0)
            found.kill(found.members[-1])
            found.settle(3)
            assert len(found.members) == life + 1, "at once"


def test_counters_go_on_when_a_number_is_used_again() -> None:
    with world(2) as found:
        found.settle(2)
        for count, generated in enumerate([7, 11, 13]):
            found.member(1).snapshot = replace_fields(STATS, generated_tokens=generated)
            stats = found.fleet.status().replicas[1].stats
            assert stats is not None
            assert stats.generated_tokens == [7, 18, 31][count]
            found.fleet.scale(1)
            found.settle(5, 5.0)
            assert found.state(1) == ""
            found.fleet.scale(2)
            found.settle(5)


class Choosy(FakeMember):
    def add(self, spec: EngineRequest) -> None:
        if spec.seq == 1:
            raise OverflowError("too large a number")
        super().add(spec)


def test_a_request_that_can_not_be_sent_ends_alone() -> None:
    with world(1, most=1) as found:
        found.settle(2)
        found.members[0].__class__ = Choosy
        for seq in range(3):
            found.add(request(seq, [seq]))
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE, 1: RefusalKind.FAILED, 2: RefusalKind.NONE}
        assert "could not be sent: OverflowError: too large a number" in found.error(1)
