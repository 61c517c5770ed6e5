"""Serving an engine over a channel: requests come in, updates go out."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from shoal.engine.build import AwaitNodes
from shoal.engine.core import EngineCore
from shoal.engine.lockstep.member import LockstepMember
from shoal.errors import EngineError, RequestError, ShoalError, UserError
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.wire.base import Stop, encode
from shoal.wire.engine import (
    Abort,
    ControlReply,
    EngineFailure,
    EngineRequest,
    NodesAwaited,
    NoPlan,
    ResetPrefixCache,
    SeqUpdate,
    SetActivity,
    Snapshot,
    StatsQuery,
    ToEngine,
    Updates,
    to_engine,
)
from shoal.wire.plan import EnginePlan, ReplicaPlace
from shoal.wire.trace import SetTracing, TraceEvents

_IDLE_S = 3600.0
_CHECK_PERIOD_S = 1.0  # how often idle ranks are checked
_SNAPSHOT_PERIOD_S = 0.5
_RANK_STATS_PERIOD_S = 5.0  # busy ranks answer between two steps, so they are asked seldom
_POLL_S = 0.5
_FLUSH_TIMEOUT_S = 1.0

JoinLockstep = Callable[[EnginePlan], LockstepMember | None]
StartEngine = Callable[[EnginePlan, LockstepMember | None, AwaitNodes], EngineCore]


def serve(channel: Channel, join: JoinLockstep, start: StartEngine) -> int:
    """Start an engine and serve it until the client sends Stop or closes the channel. Return an exit code.

    Args:
        join: joins the lockstep of an engine that shares experts with other replicas.
        start: starts the engine of a plan. Its last argument must be called when the engine awaits its nodes.
    """
    try:
        plan = _receive_plan(channel)
        lockstep = join(plan)
    except ChannelClosed:
        return 0
    except Exception as error:  # noqa: BLE001 - the client must hear of every error
        return report_failure(channel, error)
    engine: EngineCore | None = None
    try:
        engine = start(plan, lockstep, lambda address, start: channel.send(encode(NodesAwaited(address, start))))
        channel.send(encode(engine.stats()))
        serve_client(channel, engine, lockstep)
    except ChannelClosed:
        pass  # the client is gone
    except Exception as error:  # noqa: BLE001 - as above
        return report_failure(channel, report_to_replicas(error, lockstep, plan.place))
    finally:
        if lockstep is not None:
            lockstep.close()
        if engine is not None:
            engine.close()
    return 0


def receive_first(channel: Channel) -> bytes:
    """Return the first message to this process, still encoded.

    Raises:
        ChannelClosed: the other end has gone.
    """
    while not wait([channel], _IDLE_S) or not (frames := channel.receive()):
        pass
    return frames[0]


def _receive_plan(channel: Channel) -> EnginePlan:
    plan = to_engine.decode(receive_first(channel))
    if isinstance(plan, NoPlan):
        raise UserError(plan.error) if plan.user_error else EngineError(plan.error)
    if not isinstance(plan, EnginePlan):
        raise ShoalError(f"the first message to an engine must be its plan, got {type(plan).__name__}")
    return plan


def serve_client(
    channel: Channel, engine: EngineCore, lockstep: LockstepMember | None, supervisor: Channel | None = None
) -> None:
    """Serve a client until the client or the supervisor ends the engine.

    Args:
        supervisor: the process on this host that started the engine, if it is not the client; it gets statistics too.

    Raises:
        ChannelClosed: the client is gone.
        EngineError: the engine has failed.
    """
    try:
        _serve_messages(channel, engine, lockstep, supervisor)
    except EngineError:
        _send_trace(channel, engine.end_trace(ask=False))  # what was recorded before the failure
        raise


def _serve_messages(
    channel: Channel, engine: EngineCore, lockstep: LockstepMember | None, supervisor: Channel | None
) -> None:
    sources: list[Any] = [each for each in (channel, lockstep, supervisor) if each is not None]
    reporter = _Reporter([channel] if supervisor is None else [channel, supervisor], engine)
    while True:
        readable = wait(sources, 0 if engine.busy else reporter.pause)
        if supervisor is not None and supervisor in readable:  # its only message is Stop
            return
        if engine.busy:
            reporter.report(idle=False)
        elif not readable:
            engine.check()
            reporter.report(idle=True)
        if channel in readable:
            for frame in channel.receive():
                message = to_engine.decode(frame)
                if isinstance(message, Stop):
                    return
                _handle_message(channel, engine, message)
        if lockstep is not None:
            lockstep.clear()
        if engine.busy and (updates := engine.updates(_POLL_S)):
            channel.send(encode(Updates(tuple(updates))))
        _send_trace(channel, engine.take_trace())


def _send_trace(channel: Channel, recorded: Sequence[TraceEvents]) -> None:
    for events in recorded:
        channel.send(encode(events))


class _Reporter:
    """Sends snapshots of the engine while it is busy, and one more when it becomes idle.

    There is at most one every `_SNAPSHOT_PERIOD_S`, so that short idle times do not make the ranks answer.
    """

    def __init__(self, channels: Sequence[Channel], engine: EngineCore) -> None:
        self._channels = channels
        self._engine = engine
        self._last_snapshot = self._last_stats = time.monotonic()
        self._resting = True

    @property
    def pause(self) -> float:
        """The seconds that an idle engine may wait."""
        if self._resting:
            return _CHECK_PERIOD_S
        return max(0.0, self._last_snapshot + _SNAPSHOT_PERIOD_S - time.monotonic())

    def report(self, *, idle: bool) -> None:
        """Send a snapshot if it is time for one."""
        now = time.monotonic()
        if (idle and self._resting) or now - self._last_snapshot < _SNAPSHOT_PERIOD_S:
            self._resting &= idle
            return
        self._last_snapshot, self._resting = now, idle
        if idle or (now - self._last_stats >= _RANK_STATS_PERIOD_S and not self._engine.reforming):
            self._last_stats = now
            self._engine.stats()
        snapshot = encode(Snapshot(self._engine.snapshot()))
        for channel in self._channels:
            channel.send(snapshot)


def _handle_message(channel: Channel, engine: EngineCore, message: ToEngine) -> None:
    match message:
        case EngineRequest():
            try:
                engine.add(message)
            except RequestError as error:  # only this request ends
                channel.send(encode(Updates((SeqUpdate.invalid(message.seq, error),))))
        case Abort():
            engine.abort(message.seqs)
        case StatsQuery():
            channel.send(encode(engine.stats()))
        case SetTracing(limit=0):
            _send_trace(channel, engine.end_trace())
        case SetTracing():
            engine.begin_trace(message.limit)
        case SetActivity() | ResetPrefixCache():
            reply = _execute(engine, message)
            if engine.busy and (updates := engine.updates(0)):  # tokens are sent before the reply
                channel.send(encode(Updates(tuple(updates))))
            channel.send(encode(Snapshot(engine.stats())))
            channel.send(encode(reply))


def _execute(engine: EngineCore, message: SetActivity | ResetPrefixCache) -> ControlReply:
    if isinstance(message, ResetPrefixCache):
        return ControlReply(message.id, encode(engine.reset_prefix_cache(running=message.running)))
    try:
        engine.set_activity(message.activity)
    except UserError as error:
        return ControlReply(message.id, error=str(error), user_error=True)
    return ControlReply(message.id)


def _root_cause(error: Exception, lockstep: LockstepMember | None) -> Exception:
    """Return the failure of another replica if one is known, since `error` follows from it; else return `error`."""
    try:
        if lockstep is not None:
            lockstep.steps_due()
    except EngineError as theirs:
        return theirs
    return error


def report_to_replicas(error: Exception, lockstep: LockstepMember | None, place: ReplicaPlace) -> Exception:
    """Leave the lockstep and tell the other replicas of a failure. Return the error to report to the client.

    The replicas are told first, since the client may end this process when it hears of the failure.
    """
    error = _root_cause(error, lockstep)
    if lockstep is not None:
        lockstep.close(f"replica {place.rank}: {_describe(error)}")
    return error


def report_failure(channel: Channel, error: Exception) -> int:
    """Send the failure of the engine to the client. Return the exit code of this process."""
    try:
        channel.send(encode(EngineFailure(_describe(error), isinstance(error, UserError))))
        channel.flush(_FLUSH_TIMEOUT_S)
    except ChannelClosed:
        pass  # the client is gone
    return error.exit_code if isinstance(error, ShoalError) else ShoalError.exit_code


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"
