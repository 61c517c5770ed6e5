"""The states of a supervised process, and the rule by which it is started again."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.cluster.replicas.restart_budget import RestartBudget
from shoal.cluster.replicas.supervised import RunState, Supervised
from shoal.errors import ConfigError, EngineError
from support.fakes import steady

HOUR_S = 3600.0
USEFUL_S = 60.0


def supervised(most: int = 100, *, elsewhere: bool = False) -> Supervised:
    state = RunState.AWAITED if elsewhere else RunState.NEW
    return Supervised(
        restarts=RestartBudget(most, "--max-restarts"),
        started_elsewhere=elsewhere,
        useful_s=USEFUL_S,
        state=state,
        since=0.0,
    )


def started(most: int = 100, *, ready: bool = True) -> Supervised:
    found = supervised(most)
    found.started(0.0)
    if ready:
        found.became_ready(1.0)
    return found


def test_the_first_start_is_due_immediately() -> None:
    found = supervised()
    assert found.is_due(0.0)
    found.started(0.0)
    assert not found.is_due(100.0)
    assert (found.state, found.num_restarts) == (RunState.STARTING, 0)


def test_after_a_useful_run_it_is_started_again_immediately() -> None:
    found = started()
    found.ended(EngineError("killed"), 2.0, useful=True)
    assert found.is_due(2.0)
    assert found.outlook == "is started again immediately"
    found.started(2.0)
    assert found.num_restarts == 1


def test_after_a_useless_run_there_is_a_pause() -> None:
    found = started()
    found.ended(EngineError("killed"), 2.0, useful=False)
    assert not found.is_due(2.4)
    assert found.is_due(2.5)
    assert found.outlook == "is started again in 0.5 s"


@pytest.mark.parametrize(
    ("ready", "error", "why"),
    [
        (False, EngineError("killed"), "it has never been ready"),
        (True, ConfigError("it differs"), "a restart would not correct that"),
    ],
)
def test_a_failure_that_a_restart_would_not_correct_is_final(
    ready: bool, error: EngineError | ConfigError, why: str
) -> None:
    found = started(ready=ready)
    found.ended(error, 2.0, useful=True)
    assert found.state is RunState.FAILED
    assert found.error is error
    assert found.outlook == f"is not started again: {why}"


def test_a_process_that_was_never_ready_is_started_again_if_a_connected_one_was() -> None:
    found = started(ready=False)
    found.ended(EngineError("another one was killed"), 2.0, useful=True, ever_ready=True)
    assert found.state is RunState.RESTARTING


def test_a_process_that_another_host_starts_is_awaited_after_every_end() -> None:
    found = supervised(0, elsewhere=True)
    for start in range(3):
        assert not found.is_due(1e9)
        found.started(float(start))
        found.ended(ConfigError("no"), float(start), useful=False)
        assert found.state is RunState.AWAITED
    assert found.num_restarts == 2


def test_a_run_is_useful_by_its_work_or_its_length() -> None:
    found = started(ready=False)
    assert not found.was_useful(1e6, worked=False), "it is not ready"
    assert found.was_useful(0.0, worked=True)
    found.became_ready(1.0)
    assert not found.was_useful(USEFUL_S, worked=False)
    assert found.was_useful(1.0 + USEFUL_S, worked=False)


class Machine(RuleBasedStateMachine):
    """A process that is started and ends in any order, and a model of the rule."""

    @initialize(most=st.integers(0, 8), elsewhere=st.booleans())
    def begin(self, most: int, elsewhere: bool) -> None:
        self.most = most
        self.found = supervised(most, elsewhere=elsewhere)
        self.now = 0.0
        self.decided_at: list[float] = []  # when restarts were decided
        self.useless = 0  # useless runs in a row
        self.ready_since: float | None = None

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 50.0, 700.0, 4000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def may_start(self) -> bool:
        return self.found.state is RunState.AWAITED or self.found.is_due(self.now)

    @precondition(may_start)
    @rule()
    def start(self) -> None:
        before = self.found.starts
        self.found.started(self.now)
        assert self.found.starts == before + 1

    @precondition(lambda self: self.found.state is RunState.STARTING)
    @rule()
    def become_ready(self) -> None:
        self.found.became_ready(self.now)
        self.ready_since = self.now

    @precondition(lambda self: self.found.runs)
    @rule(worked=st.booleans(), user_error=st.sampled_from([False] * 9 + [True]))
    def end(self, worked: bool, user_error: bool) -> None:
        long = self.ready_since is not None and self.now - self.ready_since >= USEFUL_S
        useful = self.found.was_useful(self.now, worked=worked)
        assert useful == (worked or long)
        was_ready = self.found.was_ready
        error = ConfigError("no") if user_error else EngineError("killed")
        self.found.ended(error, self.now, useful=useful)
        self.ready_since = None
        assert self.found.error is error
        if self.found.started_elsewhere:
            assert self.found.state is RunState.AWAITED
        elif user_error or not was_ready:
            assert self.found.state is RunState.FAILED
        else:
            self.useless = 0 if useful else self.useless + 1
            self.check_restart(useful)

    def check_restart(self, useful: bool) -> None:
        if self.useless == 5 or self.recent() >= self.most:
            assert self.found.state is RunState.FAILED
            return
        assert self.found.state is RunState.RESTARTING
        self.decided_at.append(self.now)
        pause = self.found.next_start - self.now
        assert pause == 0.0 if useful else pause == pytest.approx(0.5 * 2 ** (self.useless - 1))
        assert self.found.is_due(self.now) == useful

    def recent(self) -> int:
        """Return the number of restarts within the last hour."""
        return sum(self.now - at <= HOUR_S for at in self.decided_at)

    @precondition(lambda self: self.found.state is not RunState.FAILED)
    @rule(chance=st.integers(0, 20))
    def take_out(self, chance: int) -> None:
        if not chance:
            self.found.taken_out(self.now)

    @invariant()
    def restarts_are_limited(self) -> None:
        if not hasattr(self, "found"):
            return
        assert self.recent() <= self.most
        if self.found.state in (RunState.FAILED, RunState.LEAVING):
            assert not self.found.is_due(self.now + 1e9), "the state is final"
            assert not self.found.runs
        assert (self.found.state is RunState.FAILED) == bool(self.found.why_not) or self.found.started_elsewhere


TestMachine = Machine.TestCase
TestMachine.settings = settings(steady, stateful_step_count=60)
