"""An engine at one end of a channel: requests come in, updates go out."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from shoal.cluster.lockstep.local import Joined
from shoal.engine.core import EngineCore
from shoal.errors import EngineError, RequestError, ShoalError, UserError
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.wire.base import Stop, encode
from shoal.wire.engine import (
    Abort,
    ControlReply,
    EngineFailure,
    EngineRequest,
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

_IDLE_S = 3600.0
_LOOK_S = 1.0  # how often ranks that have nothing to do are looked at
_SNAPSHOT_S = 0.5
_RANKS_S = 5.0  # how often busy ranks are asked for their numbers, for which steps must end
_POLL_S = 0.5
_LAST_WORDS_S = 1.0

Join = Callable[[EnginePlan], Joined | None]
Start = Callable[[EnginePlan, Joined | None], EngineCore]


def serve(channel: Channel, join: Join, start: Start) -> int:
    """Runs the engine that `start` makes until it is told to stop or nobody is at the other end; gives an exit code.

    `join` gives the place in a lockstep of an engine whose ranks compute together with those of other replicas.
    """
    try:
        plan = receive_plan(channel)
        lockstep = join(plan)
    except ChannelClosed:
        return 0
    except Exception as error:  # noqa: BLE001 - whoever waits for the engine is to hear of any
        return report(channel, error)
    engine: EngineCore | None = None
    try:
        engine = start(plan, lockstep)
        channel.send(encode(engine.stats()))
        answer(channel, engine, lockstep)
    except ChannelClosed:
        pass  # nobody is left to answer
    except Exception as error:  # noqa: BLE001 - as above
        return report(channel, leave(error, lockstep, plan.place))
    finally:
        if lockstep is not None:
            lockstep.close()
        if engine is not None:
            engine.close()
    return 0


def receive_plan(channel: Channel) -> EnginePlan:
    while not wait([channel], _IDLE_S) or not (frames := channel.receive()):
        pass
    plan = to_engine.decode(frames[0])
    if not isinstance(plan, EnginePlan):
        raise ShoalError(f"the first message to an engine must be its plan, got {type(plan).__name__}")
    return plan


def answer(channel: Channel, engine: EngineCore, lockstep: Joined | None, supervisor: Channel | None = None) -> None:
    """Serve a client until that or the `supervisor` on its own host says stop. The supervisor hears stats too.

    Raises:
        ChannelClosed: the client has gone.
        EngineError: the engine has failed.
    """
    sources: list[Any] = [each for each in (channel, lockstep, supervisor) if each is not None]
    reporter = _Reporter([channel] if supervisor is None else [channel, supervisor], engine)
    while True:
        readable = wait(sources, 0 if engine.busy else reporter.pause)
        if supervisor is not None and supervisor in readable:  # it says nothing but that this is the end
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
                _handle(channel, engine, message)
        if lockstep is not None:
            lockstep.quiet()
        if engine.busy and (updates := engine.updates(_POLL_S)):
            channel.send(encode(Updates(tuple(updates))))


class _Reporter:
    """Tells whoever listens how the engine does while it is busy, and once more when it rests. Never more often than
    every `_SNAPSHOT_S`: the ranks have better things to do between two requests."""

    def __init__(self, channels: Sequence[Channel], engine: EngineCore) -> None:
        self._channels = channels
        self._engine = engine
        self._said = self._asked = time.monotonic()
        self._resting = True

    @property
    def pause(self) -> float:
        """Seconds for which an engine that has nothing to do may wait."""
        return _LOOK_S if self._resting else max(0.0, self._said + _SNAPSHOT_S - time.monotonic())

    def report(self, *, idle: bool) -> None:
        now = time.monotonic()
        if (idle and self._resting) or now - self._said < _SNAPSHOT_S:
            self._resting &= idle
            return
        self._said, self._resting = now, idle
        if idle or now - self._asked >= _RANKS_S:
            self._asked = now
            self._engine.stats()
        snapshot = encode(Snapshot(self._engine.snapshot()))
        for channel in self._channels:
            channel.send(snapshot)


def _handle(channel: Channel, engine: EngineCore, message: ToEngine) -> None:
    match message:
        case EngineRequest():
            try:
                engine.add(message)
            except RequestError as error:  # ends alone
                channel.send(encode(Updates((SeqUpdate.invalid(message.seq, error),))))
        case Abort():
            engine.abort(message.seqs)
        case StatsQuery():
            channel.send(encode(engine.stats()))
        case SetActivity() | ResetPrefixCache():
            told = _obey(engine, message)
            if engine.busy and (updates := engine.updates(0)):  # tokens go before the word that there are no more
                channel.send(encode(Updates(tuple(updates))))
            channel.send(encode(Snapshot(engine.stats())))
            channel.send(encode(told))


def _obey(engine: EngineCore, message: SetActivity | ResetPrefixCache) -> ControlReply:
    if isinstance(message, ResetPrefixCache):
        return ControlReply(message.id, encode(engine.reset_prefix_cache(running=message.running)))
    try:
        engine.become(message.activity)
    except UserError as error:
        return ControlReply(message.id, error=str(error), user_error=True)
    return ControlReply(message.id)


def _cause(error: Exception, lockstep: Joined | None) -> Exception:
    """The failure of another replica, where one is known: what failed here has followed from it."""
    try:
        if lockstep is not None:
            lockstep.due()
    except EngineError as theirs:
        return theirs
    return error


def leave(error: Exception, lockstep: Joined | None, place: ReplicaPlace) -> Exception:
    """Tells the other replicas what has failed here, before a client hears of it, who may end this process. Gives the
    failure to tell of."""
    error = _cause(error, lockstep)
    if lockstep is not None:
        lockstep.close(f"replica {place.rank}: {_told(error)}")
    return error


def report(channel: Channel, error: Exception) -> int:
    """Gives an exit code."""
    try:
        channel.send(encode(EngineFailure(_told(error), isinstance(error, UserError))))
        channel.flush(_LAST_WORDS_S)
    except ChannelClosed:
        pass  # nobody is left to hear it
    return error.exit_code if isinstance(error, ShoalError) else ShoalError.exit_code


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"
