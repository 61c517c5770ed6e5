"""An engine in a separate process: `python -m shoal.engine.process --fd N --parent PID`."""

import os
import signal

import click

from shoal.addresses import Address
from shoal.engine.build import AwaitNodes, build_engine
from shoal.engine.core import EngineCore
from shoal.engine.lockstep.member import LockstepMember
from shoal.engine.lockstep.rendezvous import RendezvousLockstep
from shoal.engine.serve_channel import serve
from shoal.log import configure_logging
from shoal.process import garbage_collector
from shoal.transport.channel import Channel
from shoal.transport.connecting import connect
from shoal.transport.process import die_with_parent
from shoal.wire.base import replace_fields
from shoal.wire.plan import EnginePlan
from shoal.wire.rendezvous import PEERS_DOOR


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
def main(fd: int, parent: int) -> None:
    die_with_parent(parent)
    garbage_collector.collect_rarely()
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # Ctrl-C reaches the whole process group; the client ends this process
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    code = serve(Channel.from_fd(fd), join_lockstep, start_engine)
    os._exit(code)  # nothing is left to save, and PyTorch's teardown takes longer than the client should wait


def join_lockstep(plan: EnginePlan) -> RendezvousLockstep | None:
    """Meet the other replicas at the rendezvous of the plan, if it has one.

    Replicas that share experts stay connected, and the lockstep is returned. Other replicas only compare their
    agreements, and None is returned.
    """
    place = plan.place
    if place.size > 1:
        configure_logging(f"(replica {place.rank}) ")
    if not place.rendezvous:
        return None
    if plan.layout.shares_experts:
        return RendezvousLockstep(place, plan.agreement, timeout=plan.timeouts.start_s)
    connect(
        Address.parse(place.rendezvous),
        place.credentials,
        room=PEERS_DOOR,
        rank=place.rank,
        size=place.size,
        agreement=plan.agreement,
        timeout=plan.timeouts.start_s,
        returning=place.returning,
    ).close()
    return None


def start_engine(
    plan: EnginePlan, lockstep: LockstepMember | None, await_nodes: AwaitNodes | None = None
) -> EngineCore:
    if isinstance(lockstep, RendezvousLockstep):
        place = replace_fields(plan.place, address=lockstep.host_address, meeting=lockstep.formation)
        plan = replace_fields(plan, place=place)
    engine = build_engine(plan, own_process=True, lockstep=lockstep, await_nodes=await_nodes)
    garbage_collector.freeze()
    return engine


if __name__ == "__main__":
    main()
