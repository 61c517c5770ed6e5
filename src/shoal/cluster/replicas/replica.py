"""A replica whose engine runs in a process or thread of its own."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from shoal.activity import Activity
from shoal.cluster.replicas.engine_thread import ThreadHost
from shoal.cluster.replicas.failure_state import FailureState
from shoal.errors import EngineError, UserError
from shoal.trace.trace_inbox import TraceInbox
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import ChildProcess
from shoal.wire.base import Stop, WireError, encode
from shoal.wire.engine import (
    Abort,
    ControlReply,
    EngineFailure,
    EngineOrder,
    EngineRequest,
    EngineStats,
    NodesAwaited,
    NoPlan,
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
from shoal.wire.plan import EnginePlan, ReplicaPlace
from shoal.wire.trace import SetTracing, TraceEvents

_SLICE_S = 0.5  # how long one wait for an answer takes
_STOP_CHECK_S = 3.0  # after so long without a message, check whether the process was stopped
_END_S = 1.5  # how long an engine may take to end by itself
_PATIENCE_S = 1.0  # how long to wait for the exit status of a process that has closed its channel
_PATIENCE_OF_MANY_S = 0.25  # ... if other replicas have tokens to hand out meanwhile


class EngineHost(Protocol):
    """The process or thread in which an engine runs, and the channel to it."""

    channel: Channel

    def stopped(self) -> bool:
        """Return whether it was stopped, by SIGSTOP or a debugger."""

    def describe_exit(self, patience: float = ...) -> str:
        """Return how it ended, in words, after at most `patience` seconds."""

    def say(self, goodbye: bytes) -> None:
        """Send the message that ends it. Never raises."""

    def wait(self, timeout: float) -> bool:
        """Wait until it has ended, for at most `timeout` seconds. Return whether it has."""

    def kill(self) -> None: ...


class Replica(FailureState):
    """A replica whose engine runs in a process or thread of its own, as an EngineClient.

    The engine starts when this is made. It answers between two steps, within `answer_timeout` seconds.
    """

    def __init__(
        self,
        host: EngineHost,
        plan: EnginePlan | None,
        *,
        name: str,
        answer_timeout: float,
        one_of_many: bool = False,
        on_nodes_awaited: Callable[[NodesAwaited], object] = lambda _: None,
    ) -> None:
        """Send the plan to the engine.

        Args:
            plan: None if `give_plan` will be called with it.
            name: the name of the replica in errors.
            one_of_many: True if there are other replicas: then errors that the engine reports get the name too.
            on_nodes_awaited: is called when the engine awaits the nodes of its plan.
        """
        self.name = name
        self.died = False  # True: it has failed, and the engine itself has not reported the failure
        self._host = host
        self._error_prefix = f"{name}: " if one_of_many else ""
        self._patience = _PATIENCE_OF_MANY_S if one_of_many else _PATIENCE_S
        self._answer_timeout = answer_timeout
        self._updates: list[SeqUpdate] = []
        self._stats: list[EngineStats] = []
        self._answers: list[ControlReply] = []
        self._order_ids = itertools.count()
        self._trace = TraceInbox()
        self.snapshot: EngineStats | None = None  # the latest stats that the engine sent without being asked
        self._failure_raised = True  # `_fail` raises it; False: the next call does
        self._started = False
        self._killer: threading.Thread | None = None
        self._last_message = time.monotonic()
        self.num_messages = 0  # how many times the engine has sent something
        self._on_nodes_awaited = on_nodes_awaited
        if plan is None:
            return
        try:
            self._send(encode(plan))
        except BaseException:
            self.close()
            raise

    def give_plan(self, plan: EnginePlan | NoPlan) -> None:
        """Send the plan, or say why there is none: then the engine fails with this reason. Any thread may call it."""
        self._host.say(encode(plan))

    @property
    def channel(self) -> Channel:
        """The channel to the engine. It is readable when the engine has sent something."""
        return self._host.channel

    def ready(self, timeout: float) -> EngineStats | None:
        """Return the first stats of the engine once it can take requests; None if that takes over `timeout` seconds.

        Raises:
            UserError: the engine was asked for something that cannot work.
            EngineError: it failed.
        """
        if not self._stats:
            self._receive_stats(timeout)
        return self._stats.pop() if self._stats else None

    def await_ready(self, timeout: float) -> None:
        """Wait until the engine can take requests.

        Raises:
            UserError, EngineError: those of `ready`; or it was not ready within `timeout` seconds.
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
                self._failure_raised = not self._updates
                if self._failure_raised:
                    raise  # otherwise the next call raises it: the updates before it are handed out first
        updates, self._updates = self._updates, []
        return updates

    def stats(self, timeout: float | None = None) -> EngineStats:
        """Return the present stats of the engine.

        Raises:
            EngineError: the engine has failed; or it did not answer within `timeout` seconds, and is killed for it.
        """
        self._send(encode(StatsQuery()))
        return self._await_stats("stats", self._answer_timeout if timeout is None else timeout)

    def send_order(self, order: EngineOrder) -> None:
        """Send an order. `answers` will have the answer."""
        self._send(encode(order))

    def answers(self) -> list[ControlReply]:
        """Return the answers to orders that came with the last `updates`."""
        answers, self._answers = self._answers, []
        return answers

    def set_activity(self, activity: Activity) -> None:
        self._await_answer(SetActivity(next(self._order_ids), activity))

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        return reset_outcome_decoder.decode(self._await_answer(ResetPrefixCache(next(self._order_ids), running)))

    def begin_trace(self, limit: int) -> None:
        self._trace = TraceInbox(self._trace)
        self._send(encode(SetTracing(limit)))

    def take_trace(self) -> list[TraceEvents]:
        return self._trace.take()

    def end_trace(self) -> list[TraceEvents]:
        self.tell_trace_end()
        deadline = time.monotonic() + self._answer_timeout
        while self._trace.recording and time.monotonic() < deadline:
            self._check_open()
            self._receive(_SLICE_S)
        return self._trace.take()

    def tell_trace_end(self) -> bool:
        """Tell the engine to end its trace. Return whether `take_trace` will return a message that it has ended.

        Raises:
            EngineError: the engine has failed.
        """
        if self._trace.recording:
            self._send(encode(SetTracing(0)))
        return self._trace.recording

    def _await_answer(self, order: EngineOrder) -> bytes:
        """Send an order, and return the answer.

        There is no deadline here, because the engine has one for its ranks.

        Raises:
            UserError: the engine cannot obey.
            EngineError: the engine has failed.
        """
        self._send(encode(order))
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
        """Kill the engine without waiting for its end: a process with much memory takes seconds to end. Idempotent."""
        self._closed = True
        self._kill()

    def _kill(self) -> None:
        if self._killer is not None:
            return
        killer = threading.Thread(target=self._host.kill, name="shoal-killer", daemon=True)
        try:
            killer.start()
        except RuntimeError:  # the system has no thread left: the end of one replica must not end the others
            self._host.kill()
            return
        self._killer = killer

    @property
    def has_ended(self) -> bool:
        return self._closed or self._host.wait(0)

    def say_goodbye(self) -> None:
        """Tell the engine to end, without waiting for its end."""
        if not self._closed and self._failure is None:
            self._host.say(encode(Stop()))

    def dismiss(self) -> None:
        """Tell the engine to end, as the replica is not needed any more. Does not wait for its end."""
        self.say_goodbye()

    def end(self, deadline: float) -> None:
        """Wait for the end until `deadline` (time.monotonic()), then kill the engine. Idempotent, never raises."""
        if not self._closed:
            self._closed = True
            if self._failure is None:
                self._host.wait(max(0.0, deadline - time.monotonic()))
        self._kill()
        if self._killer is not None:
            self._killer.join()

    def _await_stats(self, what: str, timeout: float) -> EngineStats:
        begun = time.monotonic()
        while not self._stats:
            self._receive_stats(_SLICE_S)
            if not self._stats and time.monotonic() - begun > timeout:
                self._fail(f"{self.name} did not answer {what} within {timeout:g} s")
        return self._stats.pop()

    def _receive_stats(self, timeout: float) -> None:
        """Receive stats. If a failure follows them, the next call raises it."""
        self._check_open()
        try:
            self._receive(timeout)
        except EngineError:
            if not self._stats:
                raise
            self._failure_raised = False

    def _receive(self, timeout: float) -> None:
        """Receive what arrives within `timeout` seconds, and sort it by type."""
        if not wait([self._host.channel], timeout):
            if time.monotonic() - self._last_message > _STOP_CHECK_S and self._host.stopped():
                self._fail(f"{self.name} is stopped (SIGSTOP or a debugger)")
            return
        self._last_message = time.monotonic()
        self.num_messages += 1
        try:
            frames = self._host.channel.receive()
            messages = [from_engine.decode(frame) for frame in frames]
        except ChannelClosed:
            self._fail(f"{self.name} {self._host.describe_exit(self._patience)}")
        except WireError as error:
            self._fail(f"{self.name} sent a message that cannot be decoded: {error}")
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
                case TraceEvents():
                    self._trace.add(message)
                case NodesAwaited():
                    self._on_nodes_awaited(message)
                case EngineFailure():
                    self._fail(
                        self._error_prefix + message.error,
                        reason=message.error,
                        reported=True,
                        user_error=message.user_error,
                    )

    def _send(self, frame: bytes) -> None:
        self._check_open()
        try:
            self._host.channel.send(frame)
        except ChannelClosed:
            self._receive(0)  # raises the failure that the engine reported last, if it did
            self._fail(f"{self.name} {self._host.describe_exit(self._patience)}")

    def _fail(
        self, message: str, *, reason: str | None = None, reported: bool = False, user_error: bool = False
    ) -> NoReturn:
        self._failure = EngineError(message, reason)
        self.died = not reported
        self._kill()
        if user_error and not self._started:
            raise UserError(message)  # after the start it is a failure of the replica, not a mistake of a caller
        raise self._failure


class EngineProcess(Replica):
    """An engine in a child process, which ends when this process does."""

    def __init__(
        self,
        module: str,
        plan: EnginePlan | None,
        *,
        answer_timeout: float,
        place: ReplicaPlace | None = None,
        on_nodes_awaited: Callable[[NodesAwaited], object] = lambda _: None,
        on_dismissed: Callable[[], object] = lambda: None,
    ) -> None:
        """Start `python -m module`, which serves an engine on its channel.

        Args:
            plan, on_nodes_awaited: see `Replica`.
            place: the place of the replica; needed if there is no plan yet.
            on_dismissed: is called when the replica was told to end because it is not needed any more, and has ended.
        """
        place = place if plan is None else plan.place
        assert place is not None
        child = ChildProcess(module)
        alone = place.size == 1
        super().__init__(
            child,
            plan,
            name=f"engine process {child.pid}" if alone else f"replica {place.rank} (process {child.pid})",
            answer_timeout=answer_timeout,
            one_of_many=not alone,
            on_nodes_awaited=on_nodes_awaited,
        )
        self.pid = child.pid
        self._on_dismissed = on_dismissed
        self._dismissed = False

    def dismiss(self) -> None:
        super().dismiss()
        self._dismissed = True

    def abandon(self) -> None:
        super().abandon()
        if self._dismissed:
            self._dismissed = False
            self._on_dismissed()


class EngineThread(Replica):
    """An engine on a thread of this process: `serve` with the other end of the channel. It ends with the channel."""

    def __init__(self, serve: Callable[[Channel], None], plan: EnginePlan, *, answer_timeout: float) -> None:
        name = f"replica {plan.place.rank} (thread)"
        host = ThreadHost(serve, f"shoal-replica-{plan.place.rank}")
        super().__init__(host, plan, name=name, answer_timeout=answer_timeout, one_of_many=True)


class _Ending(Protocol):
    def say_goodbye(self) -> None: ...

    def end(self, deadline: float) -> None: ...


def close_all(replicas: Sequence[_Ending]) -> None:
    """End all replicas at the same time. Idempotent, never raises."""
    for replica in replicas:
        replica.say_goodbye()
    deadline = time.monotonic() + _END_S
    for replica in replicas:
        replica.end(deadline)
