"""An engine for a front end on another host: `python -m shoal.engine.remote_process --fd N --parent PID`.

The process connects to the front end, loads the model and takes requests over that connection. Its supervisor, the
process that started it, sends the plan and may end it. When the front end goes away, the process drops its requests,
keeps the weights and tries to connect again until a front end is there.
"""

import os
import signal
import time

import click

from shoal.addresses import Address
from shoal.cluster.lockstep.rendezvous import RendezvousLockstep
from shoal.cluster.members.arrival import FRONT_END
from shoal.engine.core import EngineCore
from shoal.engine.process import join_lockstep, start_engine
from shoal.engine.server import receive_plan, report_failure, report_to_replicas, serve_client
from shoal.errors import EngineError
from shoal.log import configure_logging, get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.member import connect
from shoal.transport.process import die_with_parent
from shoal.transport.relay import Relay
from shoal.wire.base import encode
from shoal.wire.plan import EnginePlan

log = get_logger("replica")

_RECONNECT_PAUSE_S = 0.5
_LOG_PERIOD_S = 60.0  # how often the log says that a front end that went away is not back


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
def main(fd: int, parent: int) -> None:
    die_with_parent(parent)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # Ctrl-C reaches the whole process group; the supervisor ends this process
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    os._exit(serve(Channel.from_fd(fd)))  # nothing to save


def serve(supervisor: Channel) -> int:
    """Serve front ends, one after the other. Return an exit code: 0 if the front end or the supervisor ended it."""
    try:
        plan = receive_plan(supervisor)
        configure_logging(f"(replica {plan.place.rank}) ")
        front_end = _FrontEnd(plan)
    except ChannelClosed:
        return 0
    except Exception as error:  # noqa: BLE001 - the supervisor must hear of every error
        return report_failure(supervisor, error)
    lockstep: RendezvousLockstep | None = None
    engine: EngineCore | None = None
    try:
        if (await_front_end(front_end, supervisor) if plan.place.returning else front_end.connect()) is None:
            return 0
        lockstep = join_lockstep(plan) if front_end.shares_experts else None
        engine = start_engine(plan, lockstep)
        _serve(engine, lockstep, front_end, supervisor)
    except Exception as error:  # noqa: BLE001 - as above
        cause = report_to_replicas(error, lockstep, plan.place)
        if front_end.line is not None:
            report_failure(front_end.line.channel, cause)
        return report_failure(supervisor, cause)
    finally:
        front_end.disconnect()
        if lockstep is not None:
            lockstep.close()
        if engine is not None:
            engine.close()
    return 0


class _FrontEnd:
    """The address of the front end and the connection to it. `line` is None while there is no connection."""

    def __init__(self, plan: EnginePlan) -> None:
        self.shares_experts = plan.layout.shares_experts
        self._agreement = plan.agreement
        self._place = plan.place
        self.address = Address.parse(plan.place.rendezvous)
        self._timeout = plan.timeouts.start_s
        self.line: Relay | None = None

    def connect(self, *, returning: bool = False) -> Relay:
        """Connect to the front end, and wait until it is there.

        Args:
            returning: the replica was connected before; it waits for a shorter time, and the caller may try again.

        Raises:
            ConfigError: the front end is not there in time, or refuses this replica; the message says why.
            EngineError: with `returning`: the front end is not there yet.
        """
        channel = connect(
            self.address,
            self._place.key,
            room=FRONT_END,
            rank=self._place.rank,
            size=self._place.size,
            agreement=self._agreement,
            timeout=_LOG_PERIOD_S if returning else self._timeout,
            returning=returning,
        )
        log.info("connected to the front end at %s", self.address)
        self.line = Relay(channel)
        return self.line

    def disconnect(self) -> None:
        """Close the connection, if there is one."""
        if self.line is not None:
            self.line.close()
            self.line = None


def _serve(
    engine: EngineCore,
    lockstep: RendezvousLockstep | None,
    front_end: _FrontEnd,
    supervisor: Channel,
) -> None:
    while (relay := front_end.line or await_front_end(front_end, supervisor, engine)) is not None:
        line = relay.channel
        stats = encode(engine.stats())
        supervisor.send(stats)
        try:
            line.send(stats)
            serve_client(line, engine, lockstep, supervisor)
            return
        except ChannelClosed:
            if lockstep is not None:  # the other replicas end too, and meet again after a restart
                raise EngineError(
                    "the front end is gone, and this replica met the others there: it must restart"
                ) from None
            log.warning("the front end is gone: its requests are dropped; waiting for a front end to come back")
        front_end.disconnect()
        engine.drop()
        time.sleep(_RECONNECT_PAUSE_S)  # so that a front end that closes each connection at once costs little


def await_front_end(front_end: _FrontEnd, supervisor: Channel, engine: EngineCore | None = None) -> Relay | None:
    """Wait for a front end without a time limit. Return None if the supervisor wants this process to end.

    Raises:
        ConfigError: the front end refuses this replica.
        EngineError: a rank has failed meanwhile.
    """
    while not wait([supervisor], 0):
        try:
            return front_end.connect(returning=True)
        except EngineError as error:
            log.warning("still waiting for the front end at %s: %s", front_end.address, error)
        if engine is not None:
            engine.check()
    return None


if __name__ == "__main__":
    main()
