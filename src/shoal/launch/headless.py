"""A host that runs replicas for a front end on another host (`shoal serve --headless`), and their supervisor."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal import env
from shoal.cluster.replicas.replica import close_all
from shoal.cluster.replicas.restart_budget import RestartBudget
from shoal.cluster.replicas.supervised import RunState, Supervised
from shoal.config.engine_options import EngineOptions
from shoal.errors import EngineError, ShoalError, UserError
from shoal.launch.agreement import host_agreement
from shoal.launch.credentials import log_protection
from shoal.launch.deployment import Deployment, place_of
from shoal.launch.host_network import own_address
from shoal.launch.open_model import locate_files, locate_tokenizer, read_options, refuse_manual_place
from shoal.log import get_logger
from shoal.planner.host_devices import describe_host
from shoal.process.stop_event import SignalEvent
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import ChildProcess
from shoal.wire.base import Stop, encode, replace_fields
from shoal.wire.engine import EngineFailure, EngineStats, Snapshot
from shoal.wire.hosts import HeadlessSetup, HostReport, PlanReceived, ToSupervisor, to_supervisor

log = get_logger("headless")

_CHECK_S = 1.0  # how often processes are checked, as they send nothing when they were stopped
_USEFUL_S = 60.0  # a run in which a replica was ready for so long was useful, even without requests


def run(model: str | None, given: Mapping[str, Any]) -> int:
    """Run this host's replicas until a signal arrives or the front end has taken all out. Return the exit code, 0.

    The front end plans the replicas. This process finds the model, and reports what the host has.

    Args:
        model, given: as for `open_model`.

    Raises:
        UserError: the front end refused a replica, or a replica cannot work on this host, before any was ready or so
            that none is left.
        EngineError: a replica could not start before any was ready; or none is left that may be started again.
    """
    options, given = read_options(model, given, online=True)
    refuse_manual_place(options)
    deployment = Deployment.of(options)
    setups = headless_setups(options, given, deployment)
    log.info(
        *("replicas %s of %d for the front end at %s", _shortened(deployment.local)),
        *(deployment.size, deployment.address),
    )
    if deployment.address is not None:
        log_protection(deployment.credentials, deployment.address.host)
    with SignalEvent() as signals:
        host = HeadlessHost(setups, max_restarts=options.serving.max_restarts)
        try:
            host.start()
            while not signals.arrived and host.any_left():
                sources: list[Any] = [signals, *host.channels]
                wait(sources, host.pause)
                host.tick()
        finally:
            host.close()
    if signals.arrived:
        log.info("ended by a signal")
    else:
        log.info("the front end has taken out all replicas of this host")
    return 0


def headless_setups(options: EngineOptions, given: Mapping[str, Any], deployment: Deployment) -> list[HeadlessSetup]:
    """Return the first message to the process of each replica of this host.

    Raises:
        UserError: the model cannot be found or read, or this host does not have the devices that the options name.
    """
    assert deployment.address is not None
    report, agreement = introduce_host(options, given, deployment.address.host)
    places = [place_of(deployment.size, number, deployment.local) for number in deployment.local]
    return [
        HeadlessSetup(
            place=replace_fields(place, rendezvous=str(deployment.address), credentials=deployment.credentials),
            report=replace_fields(report, local_rank=place.local_rank, local_size=place.local_size),
            agreement=agreement,
            start_s=options.parallel.start_timeout,
        )
        for place in places
    ]


def introduce_host(options: EngineOptions, given: Mapping[str, Any], leader: str) -> tuple[HostReport, dict[str, str]]:
    """Return the report of this host, and what it must have in common with the leader.

    Args:
        leader: the address of the leader's host.

    Raises:
        UserError: the model cannot be found or read, or this host does not have the devices that the options name.
    """
    address = own_address(leader)
    named = address if env.host_ip() else ""  # otherwise the leader knows best where it sees this host
    files = locate_files(options)
    tokenizer = str(locate_tokenizer(options, Path(files.folder)))
    report = HostReport(describe_host(options), files, tokenizer, dict(given), address=named)
    return report, host_agreement(options, files, tokenizer)


class HeadlessProcess(Protocol):
    """A process with a replica, from its start to its end."""

    drew_tokens: bool  # True: it has drawn at least one token
    is_ready: bool
    failure: EngineFailure | None  # the failure that it reported before it ended
    shares_experts: bool  # True: no replica works without the others, as the front end has planned

    @property
    def pid(self) -> int: ...

    @property
    def channel(self) -> Channel: ...

    def read_messages(self) -> bool:
        """Read its messages. Return False if it has ended or reported a failure."""

    def stopped(self) -> bool: ...

    def describe_exit(self) -> str: ...

    @property
    def exit_code(self) -> int | None: ...

    def say_goodbye(self) -> None: ...

    def end(self, deadline: float) -> None: ...


class _ReplicaProcess:
    """A child process with a replica."""

    def __init__(self, setup: HeadlessSetup) -> None:
        self.drew_tokens = False
        self.shares_experts = False
        self.is_ready = False
        self.failure: EngineFailure | None = None
        self._child = ChildProcess("shoal.engine.remote_process")
        self._child.say(encode(setup))

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def channel(self) -> Channel:
        return self._child.channel

    def read_messages(self) -> bool:
        try:
            for frame in self._child.channel.receive():
                self._take(to_supervisor.decode(frame))
        except ChannelClosed:
            return False
        return self.failure is None

    def _take(self, message: ToSupervisor) -> None:
        match message:
            case PlanReceived():
                self.shares_experts = message.shares_experts
            case EngineStats():
                self.is_ready = True
            case Snapshot():
                self.drew_tokens |= message.stats.generated_tokens > 0
            case EngineFailure():
                self.failure = message

    def stopped(self) -> bool:
        return self._child.stopped()

    def describe_exit(self) -> str:
        return self._child.describe_exit()

    @property
    def exit_code(self) -> int | None:
        return self._child.exit_code

    def say_goodbye(self) -> None:
        self._child.say(encode(Stop()))

    def end(self, deadline: float) -> None:
        self._child.wait(max(0.0, deadline - time.monotonic()))
        self._child.kill()


@dataclass(slots=True, kw_only=True)
class HeadlessReplica(Supervised):
    """A replica of this host, over all its runs. Each run has a process of its own."""

    setup: HeadlessSetup
    process: HeadlessProcess | None = None  # None: it does not run

    @property
    def number(self) -> int:
        return self.setup.place.rank


class HeadlessHost:
    """The supervisor of this host's replicas, which starts them and starts them again when they end."""

    def __init__(
        self,
        setups: Sequence[HeadlessSetup],
        launch: Callable[[HeadlessSetup], HeadlessProcess] = _ReplicaProcess,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_restarts: int,
    ) -> None:
        self._launch = launch
        self._clock = clock
        self._in_lockstep = False  # True: the replicas share experts, so none works without the others
        self.replicas = [
            HeadlessReplica(setup=setup, restarts=RestartBudget(max_restarts, "--max-restarts"), useful_s=_USEFUL_S)
            for setup in setups
        ]

    def start(self) -> None:
        """Start all replicas.

        Raises:
            EngineError: a replica cannot be started.
        """
        for replica in self.replicas:
            self._start(replica)

    def tick(self) -> None:
        """Start the replicas that are due, and handle those that have become ready, have ended or were stopped.

        Raises:
            UserError, EngineError: a replica cannot work, and no replica of this host has ever been ready, or none
                works without it.
        """
        for replica in self.replicas:
            if replica.is_due(self._clock()):
                self._start(replica)
            if replica.process is not None:
                self._check(replica, replica.process)

    def any_left(self) -> bool:
        """Return whether a replica runs or will be started again. False: the front end has taken all out.

        Raises:
            UserError, EngineError: none is left, and at least one has failed.
        """
        if any(replica.runs or replica.state is RunState.RESTARTING for replica in self.replicas):
            return True
        failed = [replica for replica in self.replicas if replica.state is RunState.FAILED]
        if failed:
            kind = UserError if any(isinstance(replica.error, UserError) for replica in failed) else EngineError
            raise kind(
                f"no replica is left on this host: {'; '.join(f'{each.error}; it {each.outlook}' for each in failed)}"
            )
        return False

    @property
    def channels(self) -> list[Channel]:
        """The channels of the replicas that run."""
        return [replica.process.channel for replica in self.replicas if replica.process is not None]

    @property
    def pause(self) -> float:
        """The seconds after which `tick` has something to do, unless a replica sends a message earlier."""
        due = [each.next_start for each in self.replicas if each.state is RunState.RESTARTING]
        return min(_CHECK_S, max(0.0, min(due, default=float("inf")) - self._clock()))

    def close(self) -> None:
        """End all replicas. Never raises."""
        close_all([replica.process for replica in self.replicas if replica.process is not None])

    @property
    def _any_was_ready(self) -> bool:
        return any(replica.was_ready for replica in self.replicas)

    def _has_worked(self, replica: HeadlessReplica) -> bool:
        """Return whether the replica has ever been ready; in lockstep, whether any has."""
        return self._any_was_ready if self._in_lockstep else replica.was_ready

    def _start(self, replica: HeadlessReplica) -> None:
        replica.started(self._clock())
        place = replace_fields(replica.setup.place, returning=self._has_worked(replica))
        try:
            replica.process = self._launch(replace_fields(replica.setup, place=place))
        except OSError as error:  # no memory for a process, or no file descriptor left
            self._end(replica, EngineError(f"replica {replica.number} cannot be started: {error}"), useful=False)

    def _check(self, replica: HeadlessReplica, process: HeadlessProcess) -> None:
        goes_on = process.read_messages()  # first, because what follows an end depends on whether it was ready
        self._in_lockstep |= process.shares_experts
        if process.is_ready and replica.state is RunState.STARTING:
            replica.became_ready(self._clock())
            log.info("replica %d (process %d) is ready", replica.number, process.pid)
        stopped = process.stopped()
        if goes_on and not stopped:
            return
        replica.process = None
        why = "is stopped (SIGSTOP or a debugger)" if stopped else process.describe_exit()
        process.end(time.monotonic())
        if process.failure is None and process.exit_code == 0:
            log.info("replica %d was taken out by the front end", replica.number)
            replica.taken_out(self._clock())
            return
        kind = UserError if process.failure is not None and process.failure.user_error else EngineError
        why = f"process {process.pid} {why}" if process.failure is None else process.failure.error
        useful = replica.was_useful(self._clock(), worked=process.drew_tokens)
        self._end(replica, kind(f"replica {replica.number}: {why}"), useful=useful)

    def _end(self, replica: HeadlessReplica, error: ShoalError, *, useful: bool) -> None:
        """Decide what follows the end of a replica. If it is given up, the others of this host go on without it."""
        if not self._any_was_ready or (isinstance(error, UserError) and self._in_lockstep):
            raise error
        replica.ended(error, self._clock(), useful=useful, ever_ready=self._has_worked(replica))
        log_line = log.error if replica.state is RunState.FAILED else log.warning
        log_line("%s; it %s", error, replica.outlook)


def _shortened(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
