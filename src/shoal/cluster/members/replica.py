"""An engine that runs by itself, in a process or on a thread, as an EngineClient."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from shoal.activity import Activity
from shoal.cluster.members.engine_thread import ThreadHost
from shoal.errors import ClosedError, EngineError, UserError
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import ChildProcess
from shoal.wire.base import Stop, WireError, encode
from shoal.wire.engine import (
    Abort,
    ControlReply,
    EngineFailure,
    EngineRequest,
    EngineStats,
    ResetOutcome,
    ResetPrefixCache,
    SeqUpdate,
    SetActivity,
    Snapshot,
    StatsQuery,
    Updates,
    from_engine,
    reset_outcome_decoder,
)
from shoal.wire.plan import EnginePlan

_SLICE_S = 0.5
_QUIET_S = 3.0  # without a word for so long while one is awaited, the process is looked at: was it stopped?
_END_S = 1.5
_PATIENCE_S = 1.0  # to learn how a process ended
_PATIENCE_OF_MANY_S = 0.25  # ... while others have tokens to hand out


class EngineHost(Protocol):
    """Where an engine runs, and the way to it: a ChildProcess, or a thread."""

    channel: Channel

    def stopped(self) -> bool: ...

    def death(self, patience: float = ...) -> str: ...

    def say(self, goodbye: bytes) -> None: ...

    def wait(self, timeout: float) -> bool: ...

    def kill(self) -> None: ...


class Replica:
    """The engine starts when this is made, and is ready when `ready` gives something. It answers between steps, within
    `answer_timeout` seconds."""

    def __init__(
        self,
        host: EngineHost,
        plan: EnginePlan | None,
        *,
        name: str,
        answer_timeout: float,
        one_of_many: bool = False,
    ) -> None:
        """`name` is for errors; also for those that the engine reports itself, if it is one of many. Without
        a `plan` it has one already."""
        self.name = name
        self.died = False  # the failure is not what the engine had to say
        self._host = host
        self._signature = f"{name}: " if one_of_many else ""
        self._patience = _PATIENCE_OF_MANY_S if one_of_many else _PATIENCE_S
        self._answer_timeout = answer_timeout
        self._updates: list[SeqUpdate] = []
        self._stats: list[EngineStats] = []
        self._answers: list[ControlReply] = []
        self._questions = itertools.count()
        self.snapshot: EngineStats | None = None  # what it said of itself last, unasked
        self._failure: EngineError | None = None
        self._told = True  # has somebody been told of the failure?
        self._started = False
        self._closed = False
        self._killing: threading.Thread | None = None
        self._heard = time.monotonic()
        self.words = 0  # how often it has said something
        try:
            if plan is not None:
                self._send(encode(plan))
        except BaseException:
            self.close()
            raise

    @property
    def channel(self) -> Channel:
        """Readable when it has something to say."""
        return self._host.channel

    def ready(self, timeout: float) -> EngineStats | None:
        """What it starts with, once it can take requests; None if that is not within `timeout` seconds.

        Raises:
            UserError: the engine was asked for something that can't work.
            EngineError: it failed.
        """
        if not self._stats:
            self._receive_stats(timeout)
        return self._stats.pop() if self._stats else None

    def await_ready(self, timeout: float) -> None:
        """
        Raises:
            UserError, EngineError: as `ready`, or it was not ready within `timeout` seconds.
        """
        try:
            self._await_stats("start", timeout)
        except BaseException:
            self.close()
            raise

    def add(self, request: EngineRequest) -> None:
        self._send(encode(request))

    def abort(self, seqs: Sequence[int]) -> None:
        if seqs and not self._closed and self._failure is None:
            self._send(encode(Abort(tuple(seqs))))

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._check_open()
        if not self._updates:
            try:
                self._receive(timeout)
            except EngineError:
                self._told = not self._updates
                if self._told:
                    raise  # otherwise next time: what came before is handed out first
        updates, self._updates = self._updates, []
        return updates

    def stats(self, timeout: float | None = None) -> EngineStats:
        """
        Raises:
            EngineError: it has failed, or does not answer within `timeout` seconds, for which it is ended.
        """
        self._send(encode(StatsQuery()))
        return self._await_stats("stats", self._answer_timeout if timeout is None else timeout)

    def tell(self, message: SetActivity | ResetPrefixCache) -> None:
        """`answers` has what it says to that, in its time."""
        self._send(encode(message))

    def answers(self) -> list[ControlReply]:
        """Those that came with the last `updates`."""
        answers, self._answers = self._answers, []
        return answers

    def become(self, activity: Activity) -> None:
        """As of an EngineClient."""
        self._ask(SetActivity(next(self._questions), activity))

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        """As of an EngineClient."""
        return reset_outcome_decoder.decode(self._ask(ResetPrefixCache(next(self._questions), running)))

    def _ask(self, message: SetActivity | ResetPrefixCache) -> bytes:
        """Waits as long as it takes: the engine has a deadline for its ranks.

        Raises:
            UserError: it can't do that.
            EngineError: it has failed.
        """
        self._send(encode(message))
        while not self._answers:
            self._check_open()
            self._receive(_SLICE_S)
        answer = self._answers.pop()
        if answer.error:
            raise UserError(answer.error) if answer.user_error else EngineError(answer.error)
        return answer.payload

    def close(self) -> None:
        close_all([self])

    def abandon(self) -> None:
        """Ends it at once, and does not wait: a process with much memory takes seconds to go. Idempotent."""
        self._closed = True
        self._kill()

    def _kill(self) -> None:
        if self._killing is not None:
            return
        reaper = threading.Thread(target=self._host.kill, name="shoal-reaper", daemon=True)
        try:
            reaper.start()
        except RuntimeError:  # the system has no thread left for it: the end of one must not be that of all
            self._host.kill()
            return
        self._killing = reaper

    @property
    def has_ended(self) -> bool:
        return self._closed or self._host.wait(0)

    def say_goodbye(self) -> None:
        """What ends it, without waiting for the end."""
        if not self._closed and self._failure is None:
            self._host.say(encode(Stop()))

    def dismiss(self) -> None:
        """Has it end for good, and does not wait: it is not needed any more."""
        self.say_goodbye()

    def end(self, deadline: float) -> None:
        """Waits until `deadline` (time.monotonic()) at most, and kills what is left. Idempotent, never raises."""
        if not self._closed:
            self._closed = True
            if self._failure is None:
                self._host.wait(max(0.0, deadline - time.monotonic()))
        self._kill()
        if self._killing is not None:
            self._killing.join()

    def _await_stats(self, what: str, timeout: float) -> EngineStats:
        begun = time.monotonic()
        while not self._stats:
            self._receive_stats(_SLICE_S)
            if not self._stats and time.monotonic() - begun > timeout:
                self._fail(f"{self.name} did not answer {what} within {timeout:g} s")
        return self._stats.pop()

    def _receive_stats(self, timeout: float) -> None:
        """A failure right behind them is told next."""
        self._check_open()
        try:
            self._receive(timeout)
        except EngineError:
            if not self._stats:
                raise
            self._told = False

    def _receive(self, timeout: float) -> None:
        """Sorts what arrives within `timeout` seconds."""
        if not wait([self._host.channel], timeout):
            if time.monotonic() - self._heard > _QUIET_S and self._host.stopped():
                self._fail(f"{self.name} is stopped (SIGSTOP or a debugger)")
            return
        self._heard = time.monotonic()
        self.words += 1
        try:
            frames = self._host.channel.receive()
            messages = [from_engine.decode(frame) for frame in frames]
        except ChannelClosed:
            self._fail(f"{self.name} {self._host.death(self._patience)}")
        except WireError as error:
            self._fail(f"{self.name} says what nobody understands: {error}")
        for message in messages:
            match message:
                case Updates():
                    self._updates += message.updates
                case EngineStats():
                    self._started = True
                    self._stats.append(message)
                case Snapshot():
                    self.snapshot = message.stats
                case ControlReply():
                    self._answers.append(message)
                case EngineFailure():
                    self._fail(
                        self._signature + message.error,
                        reason=message.error,
                        reported=True,
                        user_error=message.user_error,
                    )

    def _send(self, frame: bytes) -> None:
        self._check_open()
        try:
            self._host.channel.send(frame)
        except ChannelClosed:
            self._receive(0)  # its last words, if it had any
            self._fail(f"{self.name} {self._host.death(self._patience)}")

    def _fail(
        self, message: str, *, reason: str | None = None, reported: bool = False, user_error: bool = False
    ) -> NoReturn:
        self._failure = EngineError(message, reason)
        self.died = not reported
        self._kill()
        if user_error and not self._started:  # later it is this replica's end, and no one call's fault
            raise UserError(message)
        raise self._failure

    def _check_open(self) -> None:
        if self._failure is not None and not self._told:
            self._told = True
            raise self._failure
        if self._failure is not None:
            raise ClosedError(f"the engine has failed: {self._failure}")
        if self._closed:
            raise ClosedError("the engine was closed")


class EngineProcess(Replica):
    """An engine in a child process, which ends when this process does."""

    def __init__(self, module: str, plan: EnginePlan, *, answer_timeout: float) -> None:
        """Starts the child: `python -m` with this module, which serves an engine at its channel."""
        child = ChildProcess(module)
        alone = plan.place.size == 1
        name = f"engine process {child.pid}" if alone else f"replica {plan.place.rank} (process {child.pid})"
        super().__init__(child, plan, name=name, answer_timeout=answer_timeout, one_of_many=not alone)
        self.pid = child.pid


class EngineThread(Replica):
    """Starts `serve` with the other end of the channel on a thread of this process; it ends when the channel does."""

    def __init__(self, serve: Callable[[Channel], None], plan: EnginePlan, *, answer_timeout: float) -> None:
        name = f"replica {plan.place.rank} (thread)"
        host = ThreadHost(serve, f"shoal-replica-{plan.place.rank}")
        super().__init__(host, plan, name=name, answer_timeout=answer_timeout, one_of_many=True)


class _Ending(Protocol):
    def say_goodbye(self) -> None: ...

    def end(self, deadline: float) -> None: ...


def close_all(replicas: Sequence[_Ending]) -> None:
    """Ends all of them at the same time. Idempotent, never raises."""
    for replica in replicas:
        replica.say_goodbye()
    deadline = time.monotonic() + _END_S
    for replica in replicas:
        replica.end(deadline)
