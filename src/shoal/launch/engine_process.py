"""An engine in a process of its own: `python -m shoal.launch.engine_process --fd N --parent PID`."""

import os
import signal

import click

from shoal.addresses import Address
from shoal.cluster.lockstep.local import Joined
from shoal.cluster.lockstep.rendezvous import RendezvousLockstep
from shoal.cluster.members.arrival import PEERS
from shoal.config.engine_options import EngineOptions
from shoal.engine.core import EngineCore
from shoal.launch.build_engine import build_engine
from shoal.launch.engine_server import serve
from shoal.launch.open_model import decide
from shoal.log import configure_logging
from shoal.planner.agreement import agreement
from shoal.planner.layout import shares_experts
from shoal.process import garbage_collector
from shoal.transport.channel import Channel
from shoal.transport.member import connect
from shoal.transport.process import die_with_parent
from shoal.wire.base import replace_fields
from shoal.wire.plan import EngineSetup


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
def main(fd: int, parent: int) -> None:
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the client decides what ends
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    code = serve(Channel.from_fd(fd), join, start)
    os._exit(code)  # nothing to save; torch's own teardown takes longer than the client should wait


def join(setup: EngineSetup) -> RendezvousLockstep | None:
    """With replicas elsewhere: meets those that share experts with this one; the others only compare."""
    place = setup.place
    if place.size > 1:
        configure_logging(f"(replica {place.rank}) ")
    if not place.rendezvous:
        return None
    options = EngineOptions.from_flat(setup.model, setup.options)
    decision = decide(options, place, setup.files)
    told = agreement(options, decision)
    timeout = options.parallel.start_timeout
    if shares_experts(decision.cutting):
        return RendezvousLockstep(place, told, timeout=timeout)
    address = Address.parse(place.rendezvous)
    connect(
        address,
        place.key,
        room=PEERS,
        rank=place.rank,
        size=place.size,
        agreement=told,
        timeout=timeout,
        returning=place.returning,
    ).close()
    return None


def start(setup: EngineSetup, lockstep: Joined | None) -> EngineCore:
    options = EngineOptions.from_flat(setup.model, setup.options)
    place = setup.place
    if isinstance(lockstep, RendezvousLockstep):
        place = replace_fields(place, address=lockstep.host_address, meeting=lockstep.formation)
    engine = build_engine(options, decide(options, place, setup.files), own_process=True, lockstep=lockstep)
    garbage_collector.settle()
    return engine


if __name__ == "__main__":
    main()
