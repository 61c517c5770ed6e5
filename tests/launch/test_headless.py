"""The supervisor of a headless host, with fake processes: what follows the end of a replica, for it and the others."""

import dataclasses
import socket
from pathlib import Path

import pytest

from shoal.cluster.replicas.supervised import RunState
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
    """A process that runs until `ends` is called."""

    def __init__(self, setup: HeadlessSetup, pid: int, *, in_lockstep: bool) -> None:
        self.place = setup.place
        self.pid = pid
        self.drew_tokens = False
        self.is_ready = False
        self.shares_experts = in_lockstep
        self.failure: EngineFailure | None = None
        self.exit_code: int | None = None
        self.is_stopped = False
        self.is_unread = False  # True: it has sent that it is ready, and that was not read yet
        self._ended = False

    @property
    def channel(self) -> Channel:
        raise NotImplementedError

    def read_messages(self) -> bool:
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
    """A host with replicas 1 and 2 of 3, on a clock of its own."""

    def __init__(self, setups: list[HeadlessSetup], *, in_lockstep: bool = False, start_fails: bool = False) -> None:
        self.start_fails = start_fails  # True: no process can be started
        self.in_lockstep = in_lockstep
        self.clock = FakeClock()
        self.processes: list[FakeProcess] = []  # in the order of their starts
        self.host = HeadlessHost(setups, self._launch, self.clock, max_restarts=20)
        self.host.start()

    def _launch(self, setup: HeadlessSetup) -> FakeProcess:
        if self.start_fails:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        self.processes.append(FakeProcess(setup, pid=4711 + len(self.processes), in_lockstep=self.in_lockstep))
        return self.processes[-1]

    def replica(self, number: int) -> HeadlessReplica:
        (found,) = (replica for replica in self.host.replicas if replica.number == number)
        return found

    def tick(self) -> None:
        """Tick twice, with a pause after which all starts are due."""
        self.host.tick()
        self.clock.now += 40.0
        self.host.tick()

    def become_ready(self, *indices: int) -> None:
        for index in indices:
            self.processes[index].is_ready = True
        self.host.tick()


@pytest.fixture(scope="module")
def setups() -> list[HeadlessSetup]:
    where = {"data_parallel_address": "127.0.0.1", "data_parallel_size": 3, "data_parallel_start_rank": 1}
    given = {"headless": True, "max_model_len": 256, **where}
    options = EngineOptions.from_flat(None, given)
    return headless_setups(options, given, Deployment.of(options))


def test_a_host_reports_its_hardware_and_its_options(setups: list[HeadlessSetup]) -> None:
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
def test_a_failure_before_any_replica_was_ready_ends_the_host(
    setups: list[HeadlessSetup], user_error: bool, kind: type[Exception]
) -> None:
    world = World(setups)
    world.processes[1].ends("refused", user_error=user_error)
    with pytest.raises(kind, match="replica 2: refused"):
        world.host.tick()


@pytest.mark.parametrize("stopped", [True, False])
def test_a_replica_that_ends_just_after_it_was_ready_is_started_again(
    setups: list[HeadlessSetup], stopped: bool
) -> None:
    """The message that it is ready and its end are read together."""
    world = World(setups)
    process = world.processes[0]
    process.is_unread = True
    if stopped:
        process.is_stopped = True
    else:
        process.ends("rank 0 was killed by SIGKILL")
    world.tick()
    assert world.replica(1).state is RunState.STARTING
    assert len(world.processes) == 3  # two at the start, and one restart


@pytest.mark.parametrize("user_error", [True, False])
def test_a_replica_that_fails_does_not_end_one_that_is_ready(setups: list[HeadlessSetup], user_error: bool) -> None:
    world = World(setups)
    world.become_ready(0)
    world.processes[1].ends("it is connected already", user_error=user_error)
    world.tick()
    assert len(world.processes) == 2
    assert world.replica(1).state is RunState.READY
    assert world.replica(2).state is RunState.FAILED
    assert "it is connected already" in str(world.replica(2).error)
    assert world.host.any_left()


def test_if_no_replica_is_left_the_error_is_of_the_same_kind(setups: list[HeadlessSetup]) -> None:
    world = World(setups)
    world.become_ready(0, 1)
    for process in world.processes:
        process.ends("its --block-size is 16", user_error=True)
    world.host.tick()
    with pytest.raises(
        UserError, match=r"no replica is left on this host: replica 1: its --block-size is 16.*; replica 2: its"
    ):
        world.host.any_left()


def test_a_front_end_may_take_out_all_replicas(setups: list[HeadlessSetup]) -> None:
    world = World(setups)
    world.become_ready(0, 1)
    for process in world.processes:
        process.ends(code=0)
    world.tick()
    assert not world.host.any_left()
    assert len(world.processes) == 2


def test_a_replica_that_was_ready_comes_back_as_returning(setups: list[HeadlessSetup]) -> None:
    world = World(setups)
    assert [process.place.returning for process in world.processes] == [False, False]
    world.become_ready(0, 1)
    world.processes[0].ends("the rendezvous has gone")
    world.tick()
    assert [(process.place.rank, process.place.returning) for process in world.processes[2:]] == [(1, True)]


@pytest.mark.parametrize("drew", [True, False])
def test_a_replica_that_has_drawn_a_token_is_started_again_without_a_pause(
    setups: list[HeadlessSetup], drew: bool
) -> None:
    world = World(setups)
    world.become_ready(0, 1)
    world.processes[0].drew_tokens = drew
    world.processes[0].ends("rank 0 was killed by SIGKILL")
    world.host.tick()
    assert world.host.pause == (0.0 if drew else 0.5)


def test_in_lockstep_all_come_back_as_returning_if_one_was_ready(setups: list[HeadlessSetup]) -> None:
    world = World(setups, in_lockstep=True)
    world.become_ready(0)
    for process in world.processes:
        process.ends("the rendezvous has gone")
    world.tick()
    assert [process.place.returning for process in world.processes[2:]] == [True, True]
    world.processes[3].ends("differs", user_error=True)
    with pytest.raises(UserError, match="replica 2: differs"):
        world.host.tick()


def test_a_process_that_cannot_be_started_is_tried_again(setups: list[HeadlessSetup]) -> None:
    world = World(setups)
    world.become_ready(0, 1)
    world.processes[0].ends("out of memory")
    world.start_fails = True
    world.tick()
    assert world.replica(1).state is RunState.RESTARTING
    world.start_fails = False
    world.tick()
    assert world.replica(1).state is RunState.STARTING
    assert len(world.processes) == 3


def test_a_process_that_cannot_be_started_at_first_is_an_error(setups: list[HeadlessSetup]) -> None:
    with pytest.raises(EngineError, match=r"replica 1 cannot be started: .*Resource temporarily unavailable"):
        World(setups, start_fails=True)
