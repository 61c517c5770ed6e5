"""An engine for a front end on another host: `python -m shoal.engine.remote_process --fd N --parent PID`.

It connects to the front end, receives its plan, loads, and serves requests over that connection. The channel to the
supervisor, the process that started it, is there to end it. When the front end goes away, the engine drops its
requests, keeps its weights, and looks for the next front end without a deadline.
"""

import os
import signal
import time

import click

from shoal.addresses import Address
from shoal.engine.core import EngineCore
from shoal.engine.lockstep.rendezvous import RendezvousLockstep
from shoal.engine.process import join_lockstep, start_engine
from shoal.engine.serve_channel import receive_first, report_failure, report_to_replicas, serve_client
from shoal.errors import EngineError
from shoal.log import configure_logging, get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.connecting import connect
from shoal.transport.process import die_with_parent
from shoal.transport.relay import Relay
from shoal.wire.base import encode, replace_fields
from shoal.wire.engine import to_engine
from shoal.wire.hosts import HeadlessSetup, PlanReceived, headless_setup_decoder
from shoal.wire.plan import EnginePlan
from shoal.wire.rendezvous import FRONT_END_DOOR

log = get_logger("replica")

_PAUSE_S = 0.5  # before looking for the next front end, which may hang up while it starts
_RECONNECT_S = 60.0  # how long one attempt to reach the next front end takes, and so how often the log mentions it
_PLAN_S = 60.0  # a front end sends the plan immediately
_NOT_COMPARED = ("place", "reasons", "warnings")  # fields in which a new plan may differ from the one that is obeyed


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
    """Run the engine until the front end or the supervisor ends it. Return the exit code, 0 for such an end."""
    try:
        setup = headless_setup_decoder.decode(receive_first(supervisor))
        configure_logging(f"(replica {setup.place.rank}) ")
        front_end = FrontEnd(setup)
    except ChannelClosed:
        return 0
    except Exception as error:  # noqa: BLE001 - the supervisor must learn of any failure
        return report_failure(supervisor, error)
    lockstep: RendezvousLockstep | None = None
    engine: EngineCore | None = None
    try:
        if setup.place.returning:
            plan = await_front_end(front_end, supervisor)
        else:
            plan = front_end.connect()
        if plan is None:
            return 0
        supervisor.send(encode(PlanReceived(plan.layout.shares_experts)))
        _log_plan(plan)
        lockstep = join_lockstep(plan) if plan.layout.shares_experts else None
        engine = start_engine(plan, lockstep)
        _serve(engine, lockstep, front_end, supervisor)
    except Exception as error:  # noqa: BLE001 - as above
        cause = report_to_replicas(error, lockstep, setup.place)
        if front_end.relay is not None:
            report_failure(front_end.relay.channel, cause)
        return report_failure(supervisor, cause)
    finally:
        front_end.disconnect()
        if lockstep is not None:
            lockstep.close()
        if engine is not None:
            engine.close()
    return 0


class FrontEnd:
    """The front end, which plans this replica and sends it requests. `relay` is the connection; None: there is none."""

    def __init__(self, setup: HeadlessSetup) -> None:
        self.address = Address.parse(setup.place.rendezvous)
        self.relay: Relay | None = None
        self._setup = setup
        self._plan: EnginePlan | None = None  # the plan that is obeyed

    def connect(self, *, returning: bool = False) -> EnginePlan:
        """Wait for the front end, connect to it, and return its plan of this replica.

        Args:
            returning: there was a front end before; a missing one is an `EngineError`, after which the caller may try
                again.

        Raises:
            ConfigError: the front end cannot be reached in time, or refuses this replica; the message says why.
            EngineError: the front end is not there yet; or its plan is not the one that this replica obeys.
        """
        setup = self._setup
        channel = connect(
            self.address,
            setup.place.credentials,
            room=FRONT_END_DOOR,
            rank=setup.place.rank,
            size=setup.place.size,
            agreement=setup.agreement,
            report=encode(setup.report),
            timeout=_RECONNECT_S if returning else setup.start_s,
            returning=returning,
        )
        try:
            plan = self._receive_plan(channel)
        except BaseException:
            channel.close()
            raise
        log.info("connected to the front end at %s", self.address)
        self.relay = Relay(channel)
        return plan

    def _receive_plan(self, channel: Channel) -> EnginePlan:
        try:
            deadline = time.monotonic() + _PLAN_S
            while not (frames := channel.receive(1)):  # a plan may come in several parts
                if not wait([channel], max(deadline - time.monotonic(), 0)):
                    raise EngineError(f"the front end at {self.address} has sent no plan within {_PLAN_S:g} s")
            plan = to_engine.decode(frames[0])
        except ChannelClosed:
            raise EngineError(f"the front end at {self.address} has gone before it sent a plan") from None
        if not isinstance(plan, EnginePlan):
            raise EngineError(f"the front end at {self.address} has sent {type(plan).__name__} instead of a plan")
        ours = self._setup.place
        place = replace_fields(
            plan.place, rendezvous=ours.rendezvous, credentials=ours.credentials, returning=ours.returning
        )
        plan = replace_fields(plan, place=place)
        changed = [] if self._plan is None else differences(self._plan, plan)
        if changed:
            raise ReplannedError(
                f"the front end at {self.address} has another plan for this replica: {', '.join(changed)}"
            )
        self._plan = plan
        return plan

    def disconnect(self) -> None:
        """End the connection. Idempotent."""
        if self.relay is not None:
            self.relay.close()
            self.relay = None


class ReplannedError(EngineError):
    """A front end has made another plan for a replica that is running. The replica must be started again for it."""


def differences(old: EnginePlan, new: EnginePlan) -> list[str]:
    """Return the fields in which two plans of one replica differ, without those that need no new start."""
    fields = [name for name in EnginePlan.__struct_fields__ if name not in _NOT_COMPARED]
    return [name for name in fields if getattr(old, name) != getattr(new, name)]


def await_front_end(front_end: FrontEnd, supervisor: Channel, engine: EngineCore | None = None) -> EnginePlan | None:
    """Look for the next front end without a deadline, and return its plan. None: the supervisor ends this process.

    Raises:
        ConfigError: the front end refuses this replica.
        EngineError: a rank has failed meanwhile; or the front end has another plan for this replica.
    """
    while not wait([supervisor], 0):
        try:
            return front_end.connect(returning=True)
        except ReplannedError:
            raise
        except EngineError as error:
            log.warning("still waiting for the front end at %s: %s", front_end.address, error)
        if engine is not None:
            engine.check()
    return None


def _log_plan(plan: EnginePlan) -> None:
    """Log the reasons and warnings of a plan, once per host."""
    if plan.place.local_rank == 0:
        for reason in plan.reasons:
            log.info("%s", reason)
        for warning in plan.warnings:
            log.warning("%s", warning)


def _serve(
    engine: EngineCore,
    lockstep: RendezvousLockstep | None,
    front_end: FrontEnd,
    supervisor: Channel,
) -> None:
    """Serve one front end after the other, until one of them or the supervisor ends this engine."""
    while front_end.relay is not None or await_front_end(front_end, supervisor, engine) is not None:
        assert front_end.relay is not None
        channel = front_end.relay.channel
        stats = encode(engine.stats())
        supervisor.send(stats)
        try:
            channel.send(stats)
            serve_client(channel, engine, lockstep, supervisor)
            return
        except ChannelClosed:
            if lockstep is not None:  # the other replicas are about to end too, and to meet again
                raise EngineError(
                    "the front end, where this replica meets the others, is gone: it must restart"
                ) from None
            log.warning("the front end is gone: its requests are dropped; waiting for a front end to come back")
        front_end.disconnect()
        engine.drop()
        time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
