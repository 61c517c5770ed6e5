"""Replicas for a front end on another host: `shoal serve --headless`. Starts them, and starts again what ends."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.cluster.members.replica import close_all
from shoal.cluster.members.restarts import Restarts
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
_SERVED_S = 60.0  # a replica that was ready for so long was of use, with or without requests
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(model: OpenModel) -> int:
    """Runs this host's replicas until a signal comes, or the front end wants none of them any more. Gives exit code 0.

    Raises:
        UserError: before any was ready, the front end refuses one, or one can't work; or none is left for that.
        EngineError: before any was ready, one could not start; or none is left that could be started again.
    """
    model.log_plan()
    deployment = Deployment.of(model.options)
    numbers = _listed(deployment.local)
    log.info("replicas %s of %d for the front end at %s", numbers, deployment.size, deployment.address)
    with _SignalEvent() as signals:
        host = _Host(together=model.plan.layout.shares_experts)
        replicas = [_Supervised(model, deployment, number, host) for number in deployment.local]
        try:
            for replica in replicas:
                replica.start()
            _supervise(replicas, signals)
        finally:
            close_all([replica.life for replica in replicas if replica.life is not None])
    return 0


def _supervise(replicas: Sequence["_Supervised"], signals: "_SignalEvent") -> None:
    while not signals.came:
        waiting = [replica for replica in replicas if replica.waits]
        if not any(replica.life is not None for replica in replicas) and not waiting:
            _end(replicas)
            return
        pause = min([_LOOK_S, *(replica.next_start - time.monotonic() for replica in waiting)])
        sources: list[Any] = [signals, *(replica.life.channel for replica in replicas if replica.life is not None)]
        wait(sources, max(0.0, pause))
        for replica in replicas:
            replica.look()
    log.info("ends, as it was told to")


def _end(replicas: Sequence["_Supervised"]) -> None:
    """None is left."""
    failures = [replica.failure for replica in replicas if replica.failure is not None]
    if failures:
        kind = UserError if any(isinstance(failure, UserError) for failure in failures) else EngineError
        raise kind(f"no replica is left here: {'; '.join(map(str, failures))}")
    log.info("the front end has taken out all replicas of this host")


class _ReplicaProcess:
    """One process of a replica, from its start to its end."""

    def __init__(self, plan: EnginePlan) -> None:
        self.child = ChildProcess("shoal.launch.remote_engine")
        self.ready_at: float | None = None
        self.drew = False
        self.failure: EngineFailure | None = None  # its last words
        self.child.say(encode(plan))

    @property
    def channel(self) -> Channel:
        return self.child.channel

    def listen(self) -> bool:
        """False: it has ended."""
        try:
            for frame in self.child.channel.receive():
                self._take(from_engine.decode(frame))
        except ChannelClosed:
            return False
        return self.failure is None

    def _take(self, message: FromEngine) -> None:
        match message:
            case EngineStats():
                if self.ready_at is None:
                    self.ready_at = time.monotonic()
            case Snapshot():
                self.drew |= message.stats.generated_tokens > 0
            case EngineFailure():
                self.failure = message

    @property
    def useful(self) -> bool:
        return self.drew or (self.ready_at is not None and time.monotonic() - self.ready_at >= _SERVED_S)

    def say_goodbye(self) -> None:
        self.child.say(encode(Stop()))

    def end(self, deadline: float) -> None:
        self.child.wait(max(0.0, deadline - time.monotonic()))
        self.child.kill()


@dataclass(slots=True)
class _Host:
    """What the replicas of one have in common."""

    together: bool  # they share experts: none works without the others
    was_ready: bool = False  # was any of them, ever?


class _Supervised:
    def __init__(self, model: OpenModel, deployment: Deployment, number: int, host: _Host) -> None:
        self.number = number
        self._host = host
        self.life: _ReplicaProcess | None = None
        self.next_start = 0.0
        self.waits = False  # for its next start
        self.failure: ShoalError | None = None  # why it is not started again
        self._was_ready = False
        self._restarts = Restarts(model.options.serving.max_restarts)
        place = replace_fields(
            place_of(model, number, deployment.local), rendezvous=str(deployment.address), key=deployment.key
        )
        self._plan = model.plan_at(place)

    @property
    def _has_worked(self) -> bool:
        return self._host.was_ready if self._host.together else self._was_ready

    def start(self) -> None:
        """
        Raises:
            EngineError: it can't be started, and none of this host has ever been ready.
        """
        self.waits = False
        place = replace_fields(self._plan.place, returning=self._has_worked)
        try:
            self.life = _ReplicaProcess(replace_fields(self._plan, place=place))
        except OSError as error:  # no memory for a process, no descriptors
            self._start_again(EngineError(f"replica {self.number}: can't be started: {error}"), useful=False)

    def look(self) -> None:
        """
        Raises:
            UserError, EngineError: it can't work, and none of this host has ever been ready, or none works without it.
        """
        if self.waits and time.monotonic() >= self.next_start:
            self.start()
        life = self.life
        if life is None:
            return
        goes_on = life.listen()  # first of all: how it ends depends on whether it was ready
        if life.ready_at is not None and not self._was_ready:
            self._was_ready = self._host.was_ready = True
            log.info("replica %d (process %d) is ready", self.number, life.child.pid)
        stopped = life.child.stopped()
        if goes_on and not stopped:
            return
        self.life = None
        why = "is stopped (SIGSTOP or a debugger)" if stopped else life.child.death()
        life.end(time.monotonic())
        if life.failure is None and life.child.exit_code == 0:
            log.info("replica %d was taken out by the front end", self.number)
            return
        kind = UserError if life.failure is not None and life.failure.user_error else EngineError
        why = f"process {life.child.pid} {why}" if life.failure is None else life.failure.error
        self._start_again(kind(f"replica {self.number}: {why}"), useful=life.useful)

    def _start_again(self, error: ShoalError, *, useful: bool) -> None:
        mistake = isinstance(error, UserError)
        if not self._host.was_ready or (mistake and self._host.together):
            raise error
        if mistake or not self._has_worked:
            self._give_up(error, "the user must mend that" if mistake else "it has never been ready")
            return
        pause = self._restarts.pause(time.monotonic(), useful=useful)
        if pause is None:
            self._give_up(error, self._restarts.why_not)
            return
        log.warning("%s; it is started again %s", error, f"in {pause:g} s" if pause else "at once")
        self.waits, self.next_start = True, time.monotonic() + pause

    def _give_up(self, error: ShoalError, why: str) -> None:
        """The others of this host go on without it."""
        self.failure = type(error)(f"{error}; {why}")
        log.error("%s; it is not started again: %s", error, why)


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
