"""The replicas of a host without a front end: what one's end means to the others. Processes of a few lines."""

from typing import Any

import pytest

from shoal.errors import EngineError, UserError
from shoal.launch import headless
from shoal.launch.deployment import Deployment
from shoal.launch.headless import _Host, _supervise, _Supervised
from shoal.launch.open_model import OpenModel, open_model
from shoal.wire.engine import EngineFailure
from shoal.wire.plan import EnginePlan


class FakeChild:
    pid = 4711

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.is_stopped = False

    def stopped(self) -> bool:
        return self.is_stopped

    def death(self, patience: float = 1.0) -> str:
        return "was killed by SIGKILL"


class FakeLife:
    """Goes on until `ends` is called."""

    made: list["FakeLife"]
    no_room = False  # can none be started?

    def __init__(self, plan: EnginePlan) -> None:
        if FakeLife.no_room:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        self.place = plan.place
        self.child = FakeChild()
        self.ready_at: float | None = None
        self.failure: EngineFailure | None = None
        self.useful = False
        self.is_unread = False  # has it said that it is ready, and nobody has read that yet?
        self._ended = False
        FakeLife.made.append(self)

    def listen(self) -> bool:
        if self.is_unread:
            self.ready_at = 0.0
        return not self._ended

    def end(self, deadline: float) -> None:
        assert self._ended or self.child.is_stopped

    def ends(self, why: str = "", *, user_error: bool = False) -> None:
        self._ended = True
        self.failure = EngineFailure(why, user_error) if why else None


class World:
    """Replicas 1 and 2 of 3."""

    def __init__(self, model: OpenModel, *, together: bool = False) -> None:
        self.host = _Host(together)
        deployment = Deployment.of(model.options)
        self.replicas = [_Supervised(model, deployment, number, self.host) for number in deployment.local]
        for replica in self.replicas:
            replica.start()
        self.lives = list(FakeLife.made)

    def look(self) -> None:
        for replica in self.replicas:
            replica.next_start = 0.0  # no pauses here
            replica.look()

    def is_ready(self, *numbers: int) -> None:
        for number in numbers:
            self.lives[number].ready_at = 0.0
        self.look()


@pytest.fixture(scope="module")
def model() -> OpenModel:
    where = {"data_parallel_address": "127.0.0.1", "data_parallel_size": 3, "data_parallel_start_rank": 1}
    return open_model(None, {"headless": True, "max_model_len": 256, **where}, online=True)


@pytest.fixture(autouse=True)
def _lives(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLife.made, FakeLife.no_room = [], False
    monkeypatch.setattr(headless, "_Life", FakeLife)


@pytest.mark.parametrize(("user_error", "kind"), [(True, UserError), (False, EngineError)])
def test_what_fails_before_any_was_ready_ends_all(model: OpenModel, user_error: bool, kind: type[Exception]) -> None:
    world = World(model)
    world.lives[1].ends("refused", user_error=user_error)
    with pytest.raises(kind, match="replica 2: refused"):
        world.look()


@pytest.mark.parametrize("stopped", [True, False])
def test_one_that_ends_right_behind_its_being_ready_comes_back(model: OpenModel, stopped: bool) -> None:
    """Its word and its end are read in one go."""
    world = World(model)
    life = world.lives[0]
    life.is_unread = True
    if stopped:
        life.child.is_stopped = True
    else:
        life.ends("rank 0 was killed by SIGKILL")
    world.look()
    world.look()
    assert world.replicas[0].life is not None
    assert len(FakeLife.made) == 3  # the two of the start, and this one's next


@pytest.mark.parametrize("user_error", [True, False])
def test_what_fails_beside_one_that_was_ready_fails_alone(model: OpenModel, user_error: bool) -> None:
    world = World(model)
    world.is_ready(0)
    world.lives[1].ends("it is there already", user_error=user_error)
    world.look()
    world.look()
    assert len(FakeLife.made) == 2
    assert world.replicas[0].life is not None
    assert world.replicas[1].life is None
    assert "it is there already" in str(world.replicas[1].failure)


def test_none_that_is_left_is_an_error_of_the_kind_that_ended_them(model: OpenModel) -> None:
    world = World(model)
    world.is_ready(0, 1)
    for life in world.lives:
        life.ends("its --block-size is 16", user_error=True)
    world.look()
    with pytest.raises(
        UserError, match=r"no replica is left here: replica 1: its --block-size is 16.*; replica 2: its"
    ):
        _supervise(world.replicas, _Nothing())


class _Nothing(headless._SignalEvent):
    def __enter__(self) -> Any:
        raise AssertionError


def test_who_was_ready_comes_back_and_says_that_it_was_there(model: OpenModel) -> None:
    world = World(model)
    assert [life.place.returning for life in world.lives] == [False, False]
    world.is_ready(0, 1)
    world.lives[0].ends("the rendezvous has gone")
    world.look()
    world.look()
    assert [(life.place.rank, life.place.returning) for life in FakeLife.made[2:]] == [(1, True)]


def test_of_those_that_compute_together_one_that_was_ready_is_enough(model: OpenModel) -> None:
    world = World(model, together=True)
    world.is_ready(0)
    for life in world.lives:
        life.ends("the rendezvous has gone")
    world.look()
    world.look()
    assert [life.place.returning for life in FakeLife.made[2:]] == [True, True]
    FakeLife.made[3].ends("differs", user_error=True)
    with pytest.raises(UserError, match="replica 2: differs"):
        world.look()


def test_a_process_that_can_not_be_started_is_tried_again(model: OpenModel) -> None:
    world = World(model)
    world.is_ready(0, 1)
    world.lives[0].ends("out of memory")
    FakeLife.no_room = True
    world.look()
    world.look()
    assert world.replicas[0].waits
    assert world.replicas[0].failure is None
    FakeLife.no_room = False
    world.look()
    assert world.replicas[0].life is not None
    assert len(FakeLife.made) == 3


def test_a_process_that_can_not_be_started_at_all(model: OpenModel) -> None:
    FakeLife.no_room = True
    with pytest.raises(EngineError, match=r"replica 1: can't be started: .*Resource temporarily unavailable"):
        World(model)
