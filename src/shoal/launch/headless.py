"""Replicas for a front end on another host (`shoal serve --headless`), started and started again when they end."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.cluster.members.replica import close_all
from shoal.cluster.members.restarts import Restarts
from shoal.cluster.members.supervised import RunState, Supervised
from shoal.errors import EngineError, ShoalError, UserError
from shoal.launch.deployment import Deployment
from shoal.launch.launchers import place_of
from shoal.launch.open_model import OpenModel
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import ChildProcess
from shoal.wire.base import Stop, encode, replace_fields
from shoal.wire.engine import EngineFailure, EngineStats, FromEngine, Snapshot, from_engine
from shoal.wire.plan import EnginePlan

log = get_logger("headless")

_LOOK_S = 1.0  # how often processes are looked at: one may have been stopped
_USEFUL_S = 60.0  # a run in which a replica was ready for so long was useful, with or without requests
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(model: OpenModel) -> int:
    """Run this host's replicas until a signal comes, or the front end wants none of them any more. Return exit code 0.

    Raises:
        UserError: before any was ready, the front end refuses one, or one can't work; or none is left for that.
        EngineError: before any was ready, one could not start; or none is left that could be started again.
    """
    model.log_plan()
    deployment = Deployment.of(model.options)
    numbers = _listed(deployment.local)
    log.info("replicas %s of %d for the front end at %s", numbers, deployment.size, deployment.address)
    with _SignalEvent() as signals:
        host = HeadlessHost(model, deployment, together=model.plan.layout.shares_experts)
        try:
            host.start()
            while not signals.came and host.any_left():
                sources: list[Any] = [signals, *host.channels]
                wait(sources, host.pause)
                host.look()
        finally:
            host.close()
    if signals.came:
        log.info("ends, as it was told to")
    else:
        log.info("the front end has taken out all replicas of this host")
    return 0


class HeadlessProcess(Protocol):
    """One run of a replica, in a process."""

    drew: bool  # a token
    is_ready: bool
    failure: EngineFailure | None  # its last words

    @property
    def pid(self) -> int: ...

    @property
    def channel(self) -> Channel: ...

    def listen(self) -> bool:
        """Take in what it has said. False: it has ended."""

    def stopped(self) -> bool: ...

    def describe_exit(self) -> str: ...

    @property
    def exit_code(self) -> int | None: ...

    def say_goodbye(self) -> None: ...

    def end(self, deadline: float) -> None: ...


class _ReplicaProcess:
    """A child process with a replica."""

    def __init__(self, plan: EnginePlan) -> None:
        self.drew = False
        self.is_ready = False
        self.failure: EngineFailure | None = None
        self._child = ChildProcess("shoal.engine.remote_process")
        self._child.say(encode(plan))

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def channel(self) -> Channel:
        return self._child.channel

    def listen(self) -> bool:
        try:
            for frame in self._child.channel.receive():
                self._take(from_engine.decode(frame))
        except ChannelClosed:
            return False
        return self.failure is None

    def _take(self, message: FromEngine) -> None:
        match message:
            case EngineStats():
                self.is_ready = True
            case Snapshot():
                self.drew |= message.stats.generated_tokens > 0
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

    number: int
    plan: EnginePlan
    process: HeadlessProcess | None = None  # None: it does not run


class HeadlessHost:
    """The replicas of this host, as their supervisor sees them."""

    def __init__(
        self,
        model: OpenModel,
        deployment: Deployment,
        launch: Callable[[EnginePlan], HeadlessProcess] = _ReplicaProcess,
        clock: Callable[[], float] = time.monotonic,
        *,
        together: bool = False,
    ) -> None:
        """`together`: the replicas share experts, and none works without the others."""
        self._launch = launch
        self._clock = clock
        self._together = together
        where = {"rendezvous": str(deployment.address), "key": deployment.key}
        self.replicas = [
            HeadlessReplica(
                number=number,
                plan=model.plan_at(replace_fields(place_of(model, number, deployment.local), **where)),
                restarts=Restarts(model.options.serving.max_restarts, "--max-restarts"),
                useful_s=_USEFUL_S,
            )
            for number in deployment.local
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
        place = replace_fields(replica.plan.place, returning=self._has_worked(replica))
        try:
            replica.process = self._launch(replace_fields(replica.plan, place=place))
        except OSError as error:  # no memory for a process, no descriptors
            self._end(replica, EngineError(f"replica {replica.number} can't be started: {error}"), useful=False)

    def _look_at(self, replica: HeadlessReplica, process: HeadlessProcess) -> None:
        goes_on = process.listen()  # first of all: what follows its end depends on whether it was ready
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
        useful = replica.was_useful(self._clock(), worked=process.drew)
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
