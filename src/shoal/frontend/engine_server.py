"""An engine at one end of a channel: requests come in, updates go out."""

from collections.abc import Callable
from typing import Any

from shoal import wire
from shoal.cluster.lockstep import Joined
from shoal.engine.core import EngineCore
from shoal.errors import EngineError, RequestError, ShoalError, UserError
from shoal.transport.channel import Channel, ChannelClosed, wait

_IDLE_S = 3600.0
_POLL_S = 0.5
_LAST_WORDS_S = 1.0

Join = Callable[[wire.EngineSetup], Joined | None]
Start = Callable[[wire.EngineSetup, Joined | None], EngineCore]


def serve(channel: Channel, join: Join, start: Start) -> int:
    """Runs the engine that `start` makes until it is told to stop or nobody is at the other end; gives an exit code.

    `join` gives the place in a lockstep of an engine whose ranks compute together with those of other replicas.
    """
    try:
        setup = _setup(channel)
        lockstep = join(setup)
    except ChannelClosed:
        return 0
    except Exception as error:  # noqa: BLE001 - whoever waits for the engine is to hear of any
        return _report(channel, error)
    engine: EngineCore | None = None
    try:
        engine = start(setup, lockstep)
        channel.send(wire.encode(engine.stats()))
        _answer(channel, engine, lockstep)
    except ChannelClosed:
        pass  # nobody is left to answer
    except Exception as error:  # noqa: BLE001 - as above
        error = _cause(error, lockstep)
        if lockstep is not None:  # before the client hears of it, who may end this process
            lockstep.close(f"replica {setup.place.rank}: {_told(error)}")
        return _report(channel, error)
    finally:
        if lockstep is not None:
            lockstep.close()
        if engine is not None:
            engine.close()
    return 0


def _setup(channel: Channel) -> wire.EngineSetup:
    while not wait([channel], _IDLE_S) or not (frames := channel.receive()):
        pass
    setup = wire.to_engine.decode(frames[0])
    if not isinstance(setup, wire.EngineSetup):
        raise ShoalError(f"the first message to an engine is its setup, not {type(setup).__name__}")
    return setup


def _answer(channel: Channel, engine: EngineCore, lockstep: Joined | None) -> None:
    sources: list[Any] = [channel] if lockstep is None else [channel, lockstep]
    while True:
        readable = wait(sources, 0 if engine.busy else _IDLE_S)
        if channel in readable:
            for frame in channel.receive():
                message = wire.to_engine.decode(frame)
                if isinstance(message, wire.Stop):
                    return
                _handle(channel, engine, message)
        if lockstep is not None:
            lockstep.quiet()
        if engine.busy and (updates := engine.updates(_POLL_S)):
            channel.send(wire.encode(wire.Updates(tuple(updates))))


def _handle(channel: Channel, engine: EngineCore, message: wire.ToEngine) -> None:
    match message:
        case wire.EngineRequest():
            try:
                engine.add(message)
            except RequestError as error:  # ends alone
                refused = wire.SeqUpdate(message.seq, (), finish=wire.Finish.ABORT, error=str(error))
                channel.send(wire.encode(wire.Updates((refused,))))
        case wire.Abort():
            engine.abort(message.seqs)
        case wire.StatsQuery():
            channel.send(wire.encode(engine.stats()))


def _cause(error: Exception, lockstep: Joined | None) -> Exception:
    """The failure of another replica, where one is known: what failed here has followed from it."""
    try:
        if lockstep is not None:
            lockstep.due()
    except EngineError as theirs:
        return theirs
    return error


def _report(channel: Channel, error: Exception) -> int:
    """Gives an exit code."""
    try:
        channel.send(wire.encode(wire.EngineFailure(_told(error), isinstance(error, UserError))))
        channel.flush(_LAST_WORDS_S)
    except ChannelClosed:
        pass  # nobody is left to hear it
    return error.exit_code if isinstance(error, ShoalError) else ShoalError.exit_code


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"
