"""An engine in a process of its own: `python -m shoal.frontend.engine_process --fd N --parent PID`."""

import os
import signal

import click

from shoal import wire
from shoal.cluster.lockstep import Joined
from shoal.cluster.rendezvous_lockstep import RendezvousLockstep
from shoal.config import EngineOptions
from shoal.engine.core import EngineCore
from shoal.frontend.compose import build_engine
from shoal.frontend.engine_server import serve
from shoal.frontend.model import decide
from shoal.observe import logging
from shoal.planner.agreement import agreement
from shoal.transport.channel import Channel
from shoal.transport.process import die_with_parent


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
def main(fd: int, parent: int) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the client decides what ends
    logging.configure()
    code = serve(Channel.from_fd(fd), _join, _start)
    os._exit(code)  # nothing to save; torch's own teardown takes longer than the client should wait


def _join(setup: wire.EngineSetup) -> RendezvousLockstep | None:
    if setup.place.size > 1:
        logging.configure(f"(replica {setup.place.rank}) ")
    if not setup.place.rendezvous:
        return None
    options = EngineOptions.from_flat(setup.model, setup.options)
    told = agreement(options, decide(options, setup.place))
    return RendezvousLockstep(setup.place, told, timeout=options.parallel.start_timeout)


def _start(setup: wire.EngineSetup, lockstep: Joined | None) -> EngineCore:
    options = EngineOptions.from_flat(setup.model, setup.options)
    place = setup.place
    if isinstance(lockstep, RendezvousLockstep):
        place = wire.replace(place, address=lockstep.host_address)
    return build_engine(options, decide(options, place), own_process=True, lockstep=lockstep)


if __name__ == "__main__":
    main()
