"""Starts the engine, or the replicas, of an offline run."""

import itertools
import secrets
from contextlib import ExitStack, suppress

from shoal.addresses import Address
from shoal.cluster.lockstep.rendezvous import RendezvousLockstep
from shoal.cluster.members.replica import EngineProcess, Replica, close_all
from shoal.cluster.replica_set import ReplicaSet, await_ready
from shoal.engine.build import build_engine
from shoal.errors import AddressInUse
from shoal.launch.launchers import (
    ENGINE_PROCESS,
    ProcessLauncher,
    ThreadLauncher,
    answer_timeout,
    capacity_of,
    start_timeout,
)
from shoal.launch.open_model import OpenModel
from shoal.protocols import Engine
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import replace_fields
from shoal.wire.plan import EnginePlan, ReplicaPlace

KEY_BYTES = 32

_meetings = itertools.count()  # of this process with other replicas; they have theirs in the same order


def start_engine(model: OpenModel) -> Engine:
    """Start the engine, or the replicas, that the options ask for.

    Raises:
        UserError, EngineError: it could not start; nothing is left of it.
    """
    model.log_plan()
    if model.by_hand is not None:
        return _start_one_of_many(model, model.by_hand)
    if model.options.parallel.data_parallel_size > 1:
        return _start_replicas(model)
    return _start_alone(model, model.plan)


def _start_alone(model: OpenModel, plan: EnginePlan) -> Engine:
    if model.options.parallel.engine_process:
        return _start_process(model, plan)
    return build_engine(plan, own_process=model.own_process)


def _start_process(model: OpenModel, plan: EnginePlan) -> EngineProcess:
    engine = EngineProcess(ENGINE_PROCESS, plan, answer_timeout=answer_timeout(model))
    engine.await_ready(start_timeout(model))
    return engine


def _start_one_of_many(model: OpenModel, place: ReplicaPlace) -> Engine:
    """Start the engine of a process that is one of several replicas, each started by the user. First they compare what
    must be the same for all."""
    place = replace_fields(place, meeting=next(_meetings))
    with ExitStack() as stack:
        if place.rank == 0:
            with suppress(AddressInUse):  # it is open already, for the results
                address = Address.parse(place.rendezvous)
                stack.enter_context(Rendezvous(address.host, address.port, key=place.key))
        plan = model.plan_at(place)
        if plan.layout.shares_experts:  # it goes on when others have work and this process has none
            engine = _start_process(model, plan)
            return ReplicaSet(
                {place.rank: engine},
                {place.rank: capacity_of(model, engine.stats())},
                together=True,
                on_close=stack.pop_all().close,
            )
        RendezvousLockstep(place, plan.agreement, timeout=plan.timeouts.start_s).close()
        alone = replace_fields(place, rendezvous="", key="")  # they have met
        return _start_alone(model, replace_fields(plan, place=alone))


def _start_replicas(model: OpenModel) -> ReplicaSet:
    size = model.options.parallel.data_parallel_size
    together = model.plan.layout.shares_experts
    with ExitStack() as stack:
        rendezvous, key = "", secrets.token_hex(KEY_BYTES)
        launch: ProcessLauncher | ThreadLauncher
        if model.plan.executor == "threads":
            launch = ThreadLauncher(model)
        else:
            if together:
                rendezvous = stack.enter_context(Rendezvous(key=key)).address
            launch = ProcessLauncher(model, range(size), rendezvous=rendezvous, key=key)
        replicas: dict[int, Replica] = {}
        try:
            for number in range(size):
                replicas[number] = launch(number)
        except BaseException:
            close_all(list(replicas.values()))
            raise
        found = await_ready(replicas, start_timeout(model))
        capacities = {number: capacity_of(model, stats) for number, stats in found.items()}
        return ReplicaSet(replicas, capacities, together=together, on_close=stack.pop_all().close)
