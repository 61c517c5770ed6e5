"""An engine for a front end on another host: `python -m shoal.engine.remote_process --fd N --parent PID`.

It goes to the front end, loads, and takes requests over that connection; the channel to the process that has started it
is for its end. When the front end goes away it drops what it was at, keeps its weights, and looks for the next one, for
as long as it takes.
"""

import os
import signal
import time

import click

from shoal.addresses import Address
from shoal.cluster.lockstep.rendezvous import RendezvousLockstep
from shoal.cluster.members.arrival import FRONT_END
from shoal.engine.core import EngineCore
from shoal.engine.process import join, start
from shoal.engine.server import answer, leave, receive_plan, report
from shoal.errors import EngineError
from shoal.log import configure_logging, get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.member import connect
from shoal.transport.process import die_with_parent
from shoal.transport.relay import Relay
from shoal.wire.base import encode
from shoal.wire.plan import EnginePlan

log = get_logger("replica")

_PAUSE_S = 0.5
_SAY_S = 60.0  # how often it is said that a front end is awaited that was there before


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
def main(fd: int, parent: int) -> None:
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the supervisor decides what ends
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    os._exit(serve(Channel.from_fd(fd)))  # nothing to save


def serve(supervisor: Channel) -> int:
    """Gives an exit code: 0 if it was told to stop, by the front end or the supervisor."""
    try:
        plan = receive_plan(supervisor)
        configure_logging(f"(replica {plan.place.rank}) ")
        front_end = _FrontEnd(plan)
    except ChannelClosed:
        return 0
    except Exception as error:  # noqa: BLE001 - the supervisor is to hear of any
        return report(supervisor, error)
    lockstep: RendezvousLockstep | None = None
    engine: EngineCore | None = None
    try:
        if (return_to(front_end, supervisor) if plan.place.returning else front_end.connect()) is None:
            return 0
        lockstep = join(plan) if front_end.together else None
        engine = start(plan, lockstep)
        _serve(engine, lockstep, front_end, supervisor)
    except Exception as error:  # noqa: BLE001 - as above
        cause = leave(error, lockstep, plan.place)
        if front_end.line is not None:
            report(front_end.line.channel, cause)
        return report(supervisor, cause)
    finally:
        front_end.part()
        if lockstep is not None:
            lockstep.close()
        if engine is not None:
            engine.close()
    return 0


class _FrontEnd:
    """The way to it. `line` is None where there is none."""

    def __init__(self, plan: EnginePlan) -> None:
        self.together = plan.layout.shares_experts
        self._agreement = plan.agreement
        self._place = plan.place
        self.address = Address.parse(plan.place.rendezvous)
        self._timeout = plan.timeouts.start_s
        self.line: Relay | None = None

    def connect(self, *, returning: bool = False) -> Relay:
        """Waits for it: one that was there before for a while, after which it may be awaited again.

        Raises:
            ConfigError: it is not there in time, or refuses this replica; it says why.
            EngineError: `returning`, and it is not there yet.
        """
        channel = connect(
            self.address,
            self._place.key,
            room=FRONT_END,
            rank=self._place.rank,
            size=self._place.size,
            agreement=self._agreement,
            timeout=_SAY_S if returning else self._timeout,
            returning=returning,
        )
        log.info("arrived at the front end at %s", self.address)
        self.line = Relay(channel)
        return self.line

    def part(self) -> None:
        """Idempotent."""
        if self.line is not None:
            self.line.close()
            self.line = None


def _serve(
    engine: EngineCore,
    lockstep: RendezvousLockstep | None,
    front_end: _FrontEnd,
    supervisor: Channel,
) -> None:
    while (relay := front_end.line or return_to(front_end, supervisor, engine)) is not None:
        line = relay.channel
        stats = encode(engine.stats())
        supervisor.send(stats)
        try:
            line.send(stats)
            answer(line, engine, lockstep, supervisor)
            return
        except ChannelClosed:
            if lockstep is not None:  # the others are about to end too, and to meet anew
                raise EngineError("the front end has gone, at which this replica and the others meet") from None
            log.warning("the front end has gone; requests are dropped, and the next front end is awaited")
        front_end.part()
        engine.drop()
        time.sleep(_PAUSE_S)  # for a front end that hangs up on whoever arrives


def return_to(front_end: _FrontEnd, supervisor: Channel, engine: EngineCore | None = None) -> Relay | None:
    """Looks for a front end without an end; None: the supervisor wants this process to end.

    Raises:
        ConfigError: it refuses this replica.
        EngineError: a rank has failed meanwhile.
    """
    while not wait([supervisor], 0):
        try:
            return front_end.connect(returning=True)
        except EngineError as error:
            log.warning("the front end at %s is still awaited: %s", front_end.address, error)
        if engine is not None:
            engine.check()
    return None


if __name__ == "__main__":
    main()
