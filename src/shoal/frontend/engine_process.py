"""An engine in a process of its own: `python -m shoal.frontend.engine_process --fd N --parent PID`."""

import signal
import sys

import click

from shoal import wire
from shoal.config import EngineOptions
from shoal.engine.core import EngineCore
from shoal.errors import RequestError, ShoalError, UserError
from shoal.frontend.compose import build_engine
from shoal.frontend.model import decide
from shoal.observe import logging
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.process import die_with_parent

_IDLE_S = 3600.0
_POLL_S = 0.5


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
def main(fd: int, parent: int) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the client decides what ends
    logging.configure()
    channel = Channel.from_fd(fd)
    engine: EngineCore | None = None
    try:
        engine = _start(channel)
        _serve(channel, engine)
    except ChannelClosed:
        pass  # nobody is left to answer
    except ShoalError as error:
        channel.send(wire.encode(wire.EngineFailure(str(error), isinstance(error, UserError))))
        channel.flush(timeout=1.0)
        sys.exit(error.exit_code)
    finally:
        if engine is not None:
            engine.close()


def _start(channel: Channel) -> EngineCore:
    while not wait([channel], _IDLE_S) or not (frames := channel.receive()):
        pass
    setup = wire.to_engine.decode(frames[0])
    if not isinstance(setup, wire.EngineSetup):
        raise ShoalError(f"the first message to an engine is its setup, not {type(setup).__name__}")
    options = EngineOptions.from_flat(setup.model, setup.options)
    engine = build_engine(options, decide(options), own_process=True)
    channel.send(wire.encode(engine.stats()))
    return engine


def _serve(channel: Channel, engine: EngineCore) -> None:
    while True:
        if wait([channel], 0 if engine.busy else _IDLE_S):
            for frame in channel.receive():
                message = wire.to_engine.decode(frame)
                if isinstance(message, wire.Stop):
                    return
                _handle(channel, engine, message)
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


if __name__ == "__main__":
    main()
