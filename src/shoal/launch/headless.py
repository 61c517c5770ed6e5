"""Replicas for a front end on another host (`shoal serve --headless`), started and started again when they end."""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal.cluster.members.replica import close_all
from shoal.cluster.members.restarts import Restarts
from shoal.cluster.members.supervised import RunState, Supervised
from shoal.config.engine_options import EngineOptions
from shoal.errors import EngineError, ShoalError, UserError
from shoal.launch.agreement import host_agreement
from shoal.launch.deployment import Deployment, place_of
from shoal.launch.open_model import locate_files, locate_tokenizer, read_options, refuse_manual_place
from shoal.log import get_logger
from shoal.planner.host_devices import describe_host
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import ChildProcess
from shoal.wire.base import Stop, encode, replace_fields
from shoal.wire.engine import EngineFailure, EngineStats, Snapshot
from shoal.wire.hosts import HeadlessSetup, HostReport, PlanReceived, ToSupervisor, to_supervisor

log = get_logger("headless")

_LOOK_S = 1.0  # how often processes are looked at: one may have been stopped
_USEFUL_S = 60.0  # a run in which a replica was ready for so long was useful, with or without requests
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(model: str | None, given: Mapping[str, Any]) -> int:
    """Run this host's replicas until a signal comes, or the front end wants none of them any more. Return exit code 0.

    The front end plans the replicas. This process finds the model, and reports what the host has.

    Args:
        model, given: as for `open_model`.

    Raises:
        UserError: before any was ready, the front end refuses one, or one can't work; or none is left for that.
        EngineError: before any was ready, one could not start; or none is left that could be started again.
    """
    options, given = read_options(model, given, online=True)
    refuse_manual_place(options)
    deployment = Deployment.of(options)
    setups = headless_setups(options, given, deployment)
    log.info(
        *("replicas %s of %d for the front end at %s", _listed(deployment.local)),
        *(deployment.size, deployment.address),
    )
    with _SignalEvent() as signals:
        host = HeadlessHost(setups, max_restarts=options.serving.max_restarts)
        try:
            host.start()
            while not signals.came and host.any_left():
                sources: list[Any] = [signals, *host.channels]
                wait(sources, host.pause)
                host.look()
        finally:
            host.close()
    if signals.came:
        log.info("ended by a signal")
    else:
        log.info("the front end has taken out all replicas of this host")
    return 0


def headless_setups(options: EngineOptions, given: Mapping[str, Any], deployment: Deployment) -> list[HeadlessSetup]:
    """Return the first message to the process of each replica of this host.

    Raises:
        UserError: the model cannot be found or read, or this host does not have the devices that the options name.
    """
    files = locate_files(options)
    tokenizer = str(locate_tokenizer(options, Path(files.folder)))
    facts = describe_host(options)
    agreement = host_agreement(options, files, tokenizer)
    places = [place_of(deployment.size, number, deployment.local) for number in deployment.local]
    return [
        HeadlessSetup(
            place=replace_fields(place, rendezvous=str(deployment.address), key=deployment.key),
            report=HostReport(facts, files, tokenizer, dict(given), place.local_rank, place.local_size),
            agreement=agreement,
            start_s=options.parallel.start_timeout,
        )
        for place in places
    ]


class HeadlessProcess(Protocol):
    """One run of a replica, in a process."""

    drew_tokens: bool  # it has generated at least one token
    is_ready: bool
    failure: EngineFailure | None  # the failure that it reported before it ended
    shares_experts: bool  # the front end says that no replica works without the others

    @property
    def pid(self) -> int: ...

    @property
    def channel(self) -> Channel: ...

    def listen(self) -> bool:
        """Read its messages. Return False if it has ended."""

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

    def listen(self) -> bool:
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
    """A replica of this host, which a front end elsewhere uses."""

    setup: HeadlessSetup
    process: HeadlessProcess | None = None  # None: it does not run

    @property
    def number(self) -> int:
        return self.setup.place.rank


class HeadlessHost:
    """The replicas of this host, as their supervisor sees them."""

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
        self._together = False  # the replicas share experts, and none works without the others
        self.replicas = [
            HeadlessReplica(setup=setup, restarts=Restarts(max_restarts, "--max-restarts"), useful_s=_USEFUL_S)
            for setup in setups
        ]

    def start(self) -> None:
        """Start all replicas.

        Raises:
            EngineError: one can't be started.
        """
        for replica in self.replicas:
            self._start(replica)

    def look(self) -> None:
        """Start the replicas that are due, and see to those that have ended or were stopped.

        Raises:
            UserError, EngineError: one can't work, and none of this host has ever been ready, or none works without it.
        """
        for replica in self.replicas:
            if replica.is_due(self._clock()):
                self._start(replica)
            if replica.process is not None:
                self._look_at(replica, replica.process)

    def any_left(self) -> bool:
        """Return whether a replica runs or is to be started again.

        Raises:
            UserError, EngineError: none is left, and not all of them were taken out by the front end.
        """
        if any(replica.runs or replica.state is RunState.RESTARTING for replica in self.replicas):
            return True
        failed = [replica for replica in self.replicas if replica.state is RunState.FAILED]
        if failed:
            kind = UserError if any(isinstance(replica.error, UserError) for replica in failed) else EngineError
            raise kind(f"no replica is left here: {'; '.join(f'{each.error}; it {each.outlook}' for each in failed)}")
        return False

    @property
    def channels(self) -> list[Channel]:
        """The channels of the replicas that run."""
        return [replica.process.channel for replica in self.replicas if replica.process is not None]

    @property
    def pause(self) -> float:
        """Seconds after which `look` has something to do, if no replica says anything before."""
        due = [each.next_start for each in self.replicas if each.state is RunState.RESTARTING]
        return min(_LOOK_S, max(0.0, min(due, default=float("inf")) - self._clock()))

    def close(self) -> None:
        """End all replicas. Never raises."""
        close_all([replica.process for replica in self.replicas if replica.process is not None])

    @property
    def _any_was_ready(self) -> bool:
        return any(replica.was_ready for replica in self.replicas)

    def _has_worked(self, replica: HeadlessReplica) -> bool:
        """Return whether it, or those that it works with, has ever been ready."""
        return self._any_was_ready if self._together else replica.was_ready

    def _start(self, replica: HeadlessReplica) -> None:
        replica.started(self._clock())
        place = replace_fields(replica.setup.place, returning=self._has_worked(replica))
        try:
            replica.process = self._launch(replace_fields(replica.setup, place=place))
        except OSError as error:  # no memory for a process, no descriptors
            self._end(replica, EngineError(f"replica {replica.number} can't be started: {error}"), useful=False)

    def _look_at(self, replica: HeadlessReplica, process: HeadlessProcess) -> None:
        goes_on = process.listen()  # first of all: what follows its end depends on whether it was ready
        self._together |= process.shares_experts
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
        """Have a replica that has ended started again. If it is given up, the others of this host go on without it."""
        if not self._any_was_ready or (isinstance(error, UserError) and self._together):
            raise error
        replica.ended(error, self._clock(), useful=useful, ever_ready=self._has_worked(replica))
        say = log.error if replica.state is RunState.FAILED else log.warning
        say("%s; it %s", error, replica.outlook)


class _SignalEvent:
    """Something to `wait` for, while it is entered: readable when one has come that asks for the end."""

    backlog = False

    def __init__(self) -> None:
        self.came = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "_SignalEvent":
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for number in _SIGNALS:
            self._former[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        os.close(self._fd)

    def _hear(self, number: int, frame: object) -> None:
        self.came = True
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
