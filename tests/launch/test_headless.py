"""The replicas of a host without a front end: what one's end means to the others. Processes of a few lines."""

import dataclasses
import socket
from pathlib import Path

import pytest

from shoal.cluster.members.supervised import RunState
from shoal.config.engine_options import EngineOptions
from shoal.devices import cpu
from shoal.errors import EngineError, UserError
from shoal.launch.deployment import Deployment
from shoal.launch.headless import HeadlessHost, HeadlessReplica, headless_setups
from shoal.transport.channel import Channel
from shoal.wire.engine import EngineFailure
from shoal.wire.hosts import HeadlessSetup, HostFacts
from support.fakes import FakeClock


class FakeProcess:
    """Runs until `ends` is called."""

    def __init__(self, setup: HeadlessSetup, pid: int, *, together: bool) -> None:
        self.place = setup.place
        self.pid = pid
        self.drew_tokens = False
        self.is_ready = False
        self.shares_experts = together
        self.failure: EngineFailure | None = None
        self.exit_code: int | None = None
        self.is_stopped = False
        self.is_unread = False  # it has said that it is ready, and nobody has read that yet
        self._ended = False

    @property
    def channel(self) -> Channel:
        raise NotImplementedError

    def listen(self) -> bool:
        self.is_ready |= self.is_unread
        return not self._ended

    def stopped(self) -> bool:
        return self.is_stopped

    def describe_exit(self) -> str:
        return "was killed by SIGKILL"

    def say_goodbye(self) -> None: ...

    def end(self, deadline: float) -> None:
        assert self._ended or self.is_stopped

    def ends(self, why: str = "", *, user_error: bool = False, code: int | None = None) -> None:
        self._ended = True
        self.exit_code = code
        self.failure = EngineFailure(why, user_error) if why else None


class World:
    """Replicas 1 and 2 of 3."""

    def __init__(self, setups: list[HeadlessSetup], *, together: bool = False, no_room: bool = False) -> None:
        self.no_room = no_room  # can none be started?
        self.together = together
        self.clock = FakeClock()
        self.processes: list[FakeProcess] = []  # in the order of their starts
        self.host = HeadlessHost(setups, self._launch, self.clock, max_restarts=20)
        self.host.start()

    def _launch(self, setup: HeadlessSetup) -> FakeProcess:
        if self.no_room:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        self.processes.append(FakeProcess(setup, pid=4711 + len(self.processes), together=self.together))
        return self.processes[-1]

    def replica(self, number: int) -> HeadlessReplica:
        (found,) = (replica for replica in self.host.replicas if replica.number == number)
        return found

    def look(self) -> None:
        """Twice, with a pause in which all starts have become due."""
        self.host.look()
        self.clock.now += 40.0
        self.host.look()

    def is_ready(self, *indices: int) -> None:
        for index in indices:
            self.processes[index].is_ready = True
        self.host.look()


@pytest.fixture(scope="module")
def setups() -> list[HeadlessSetup]:
    where = {"data_parallel_address": "127.0.0.1", "data_parallel_size": 3, "data_parallel_start_rank": 1}
    given = {"headless": True, "max_model_len": 256, **where}
    options = EngineOptions.from_flat(None, given)
    return headless_setups(options, given, Deployment.of(options))


def test_a_host_reports_what_it_has_and_was_given(setups: list[HeadlessSetup]) -> None:
    """The key is proved, and never sent."""
    assert [setup.place.rank for setup in setups] == [1, 2]
    assert [(setup.report.local_rank, setup.report.local_size) for setup in setups] == [(0, 2), (1, 2)]
    report = setups[0].report
    hardware = dataclasses.replace(cpu.discover(), host_memory_available=report.facts.hardware.host_memory_available)
    assert report.facts == HostFacts(socket.gethostname(), hardware)
    assert report.options["max_model_len"] == 256
    assert Path(report.files.folder).is_absolute()
    assert {"version of Shoal", "--block-size", "config.json", "set of weights", "tokenizer"} <= setups[
        0
    ].agreement.keys()


@pytest.mark.parametrize(("user_error", "kind"), [(True, UserError), (False, EngineError)])
def test_what_fails_before_any_was_ready_ends_all(
    setups: list[HeadlessSetup], user_error: bool, kind: type[Exception]
) -> None:
    world = World(setups)
    world.processes[1].ends("refused", user_error=user_error)
    with pytest.raises(kind, match="replica 2: refused"):
        world.host.look()


@pytest.mark.parametrize("stopped", [True, False])
def test_one_that_ends_just_after_it_was_ready_comes_back(setups: list[HeadlessSetup], stopped: bool) -> None:
    """Its word and its end are read in one go."""
    world = World(setups)
    process = world.processes[0]
    process.is_unread = True
    if stopped:
        process.is_stopped = True
    else:
        process.ends("rank 0 was killed by SIGKILL")
    world.look()
    assert world.replica(1).state is RunState.STARTING
    assert len(world.processes) == 3  # the two of the start, and its next one


@pytest.mark.parametrize("user_error", [True, False])
def test_what_fails_beside_one_that_was_ready_fails_alone(setups: list[HeadlessSetup], user_error: bool) -> None:
    world = World(setups)
    world.is_ready(0)
    world.processes[1].ends("it is there already", user_error=user_error)
    world.look()
    assert len(world.processes) == 2
    assert world.replica(1).state is RunState.READY
    assert world.replica(2).state is RunState.FAILED
    assert "it is there already" in str(world.replica(2).error)
    assert world.host.any_left()


def test_none_that_is_left_is_an_error_of_the_kind_that_ended_them(setups: list[HeadlessSetup]) -> None:
    world = World(setups)
    world.is_ready(0, 1)
    for process in world.processes:
        process.ends("its --block-size is 16", user_error=True)
    world.host.look()
    with pytest.raises(
        UserError, match=r"no replica is left here: replica 1: its --block-size is 16.*; replica 2: its"
    ):
        world.host.any_left()


def test_a_front_end_may_take_out_all(setups: list[HeadlessSetup]) -> None:
    world = World(setups)
    world.is_ready(0, 1)
    for process in world.processes:
        process.ends(code=0)
    world.look()
    assert not world.host.any_left()
    assert len(world.processes) == 2


def test_who_was_ready_comes_back_and_says_that_it_was_there(setups: list[HeadlessSetup]) -> None:
    world = World(setups)
    assert [process.place.returning for process in world.processes] == [False, False]
    world.is_ready(0, 1)
    world.processes[0].ends("the rendezvous has gone")
    world.look()
    assert [(process.place.rank, process.place.returning) for process in world.processes[2:]] == [(1, True)]


@pytest.mark.parametrize("drew", [True, False])
def test_one_that_has_drawn_a_token_comes_back_without_a_pause(setups: list[HeadlessSetup], drew: bool) -> None:
    world = World(setups)
    world.is_ready(0, 1)
    world.processes[0].drew_tokens = drew
    world.processes[0].ends("rank 0 was killed by SIGKILL")
    world.host.look()
    assert world.host.pause == (0.0 if drew else 0.5)


def test_of_those_that_compute_together_one_that_was_ready_is_enough(setups: list[HeadlessSetup]) -> None:
    world = World(setups, together=True)
    world.is_ready(0)
    for process in world.processes:
        process.ends("the rendezvous has gone")
    world.look()
    assert [process.place.returning for process in world.processes[2:]] == [True, True]
    world.processes[3].ends("differs", user_error=True)
    with pytest.raises(UserError, match="replica 2: differs"):
        world.host.look()


def test_a_process_that_can_not_be_started_is_tried_again(setups: list[HeadlessSetup]) -> None:
    world = World(setups)
    world.is_ready(0, 1)
    world.processes[0].ends("out of memory")
    world.no_room = True
    world.look()
    assert world.replica(1).state is RunState.RESTARTING
    world.no_room = False
    world.look()
    assert world.replica(1).state is RunState.STARTING
    assert len(world.processes) == 3


def test_a_process_that_can_not_be_started_at_all(setups: list[HeadlessSetup]) -> None:
    with pytest.raises(EngineError, match=r"replica 1 can't be started: .*Resource temporarily unavailable"):
        World(setups, no_room=True)
