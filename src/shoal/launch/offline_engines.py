"""The start of the engine, or of several replicas, for an offline run."""

import functools
import itertools
import secrets
from contextlib import ExitStack, suppress

from shoal.addresses import Address
from shoal.cluster.replica_set import ReplicaSet
from shoal.cluster.replicas.replica import EngineProcess, Replica, close_all
from shoal.cluster.replicas.replica_client import await_ready
from shoal.engine.build import build_engine
from shoal.engine.lockstep.rendezvous import RendezvousLockstep
from shoal.errors import AddressInUse, ConfigError, EngineError, ShoalError
from shoal.executors.table import EXECUTORS
from shoal.launch.credentials import log_protection
from shoal.launch.deployment import place_of
from shoal.launch.followers import Followers
from shoal.launch.launchers import (
    ENGINE_PROCESS,
    ProcessLauncher,
    ThreadLauncher,
    answer_timeout,
    capacity_of,
    start_timeout,
)
from shoal.launch.leader import Leader, make_leader
from shoal.launch.open_model import OpenModel
from shoal.protocols import Engine
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import replace_fields
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.plan import EnginePlan, ReplicaPlace

KEY_BYTES = 32

# The numbers of this process's meetings with other replicas. All processes make the same models in the same order, so
# they count alike.
_meetings = itertools.count()


def start_engine(model: OpenModel, followers: Followers | None = None) -> Engine:
    """Start the engine, or the replicas, that the options ask for.

    Args:
        followers: those of this process, if it leads over several hosts.

    Raises:
        UserError, EngineError: it could not start; no process is left running.
    """
    model.log_plan()
    if model.manual_place is not None:
        return _start_manual_replica(model, model.manual_place)
    leader = make_leader(model, followers)
    if leader is not None:
        return _start_over_nodes(model, leader)
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


def _start_over_nodes(model: OpenModel, leader: Leader) -> Engine:
    """Start the engine, or the replicas, over several nodes. Their end dismisses the nodes."""
    try:
        if leader.num_replicas == 1 and not model.options.parallel.engine_process:
            plan = leader.plan(place_of(1, 0), model.plan.timeouts.start_s)
            return build_engine(plan, await_nodes=functools.partial(leader.call, 0), on_close=leader.dismiss)
        return _start_replicas(model, leader)
    except BaseException as error:
        leader.dismiss(error if isinstance(error, ShoalError) else EngineError("the leader was interrupted"))
        raise


def _start_manual_replica(model: OpenModel, place: ReplicaPlace) -> Engine:
    """Start the engine of this process, which is one of several replicas that the user started one by one.

    The replicas first meet and compare their agreement.
    """
    place = replace_fields(place, meeting=next(_meetings))
    plan = model.plan_at(place)
    if plan.layout.shares_experts and EXECUTORS[plan.executor].replicas_are_threads:
        raise ConfigError(
            f"--distributed-executor-backend {plan.executor}: replicas of several processes cannot share experts, as "
            "their ranks would have to be processes; leave it out"
        )
    address = Address.parse(place.rendezvous)
    log_protection(place.credentials, address.host)
    with ExitStack() as stack:
        if place.rank == 0:
            with suppress(AddressInUse):  # a DataParallelRank of this process has opened it already
                stack.enter_context(Rendezvous(address.host, address.port, credentials=place.credentials))
        if plan.layout.shares_experts:  # the engine must compute when others have work, whatever this process does
            engine = _start_process(model, plan)
            return ReplicaSet(
                {place.rank: engine},
                {place.rank: capacity_of(model, engine.stats())},
                in_lockstep=True,
                on_close=stack.pop_all().close,
            )
        RendezvousLockstep(place, plan.agreement, timeout=plan.timeouts.start_s).close()
        # Without a rendezvous, so that the engine does not meet the others again.
        alone = replace_fields(place, rendezvous="", credentials=NO_CREDENTIALS)
        return _start_alone(model, replace_fields(plan, place=alone))


def _start_replicas(model: OpenModel, leader: Leader | None = None) -> ReplicaSet:
    """Start all replicas. `leader`: the leader of the nodes over which each of them is spread."""
    size = model.options.parallel.data_parallel_size
    in_lockstep = model.plan.layout.shares_experts
    with ExitStack() as stack:
        rendezvous, credentials = "", Credentials(secrets.token_hex(KEY_BYTES))
        launch: ProcessLauncher | ThreadLauncher
        if leader is not None:
            launch = ProcessLauncher(
                model, range(size), rendezvous=leader.rendezvous, credentials=leader.credentials, leader=leader
            )
            stack.callback(leader.dismiss)
        elif EXECUTORS[model.plan.executor].replicas_are_threads:
            launch = ThreadLauncher(model)
        else:
            if in_lockstep:
                rendezvous = stack.enter_context(Rendezvous(credentials=credentials)).address
            launch = ProcessLauncher(model, range(size), rendezvous=rendezvous, credentials=credentials)
        replicas: dict[int, Replica] = {}
        try:
            for number in range(size):
                replicas[number] = launch(number)
        except BaseException:
            close_all(list(replicas.values()))
            raise
        found = await_ready(replicas, start_timeout(model))
        capacities = {number: capacity_of(model, stats) for number, stats in found.items()}
        return ReplicaSet(replicas, capacities, in_lockstep=in_lockstep, on_close=stack.pop_all().close)
