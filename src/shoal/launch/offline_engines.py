"""Engines that run by themselves: one in a process of its own, or several replicas side by side."""

import itertools
import secrets
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from shoal.addresses import Address
from shoal.cluster.lockstep.local import Joined, LocalLockstep
from shoal.cluster.lockstep.rendezvous import RendezvousLockstep
from shoal.cluster.members.replica import EngineProcess, EngineThread, Replica, close_all
from shoal.cluster.replica_set import ReplicaSet, await_ready
from shoal.cluster.routing.capacity import ReplicaCapacity, most_held
from shoal.engine.core import EngineCore
from shoal.errors import AddressInUse
from shoal.launch.build_engine import build_engine, shared_groups
from shoal.launch.engine_server import serve
from shoal.launch.open_model import OpenModel, decide
from shoal.planner.agreement import agreement
from shoal.planner.layout import shares_experts
from shoal.protocols import Engine
from shoal.transport.channel import Channel
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineStats
from shoal.wire.plan import EngineSetup, ReplicaPlace

_START_PHASES = 5  # each of which may take --start-timeout
KEY_BYTES = 32
ENGINE_PROCESS = "shoal.launch.engine_process"

_meetings = itertools.count()  # of this process with other replicas; they have theirs in the same order


def start_engine(model: OpenModel) -> Engine:
    """The engine, or the replicas, that the options ask for.

    Raises:
        UserError, EngineError: it could not start; nothing is left of it.
    """
    parallel = model.options.parallel
    if model.by_hand is not None:
        return _start_one_of_many(model, model.by_hand)
    if parallel.data_parallel_size > 1:
        return _start_replicas(model)
    return _start_alone(model, ReplicaPlace())


def _start_alone(model: OpenModel, place: ReplicaPlace) -> Engine:
    if model.options.parallel.engine_process:
        return _start_process(model, place)
    return build_engine(model.options, model.decision, own_process=model.own_process)


def _start_process(model: OpenModel, place: ReplicaPlace) -> EngineProcess:
    engine = EngineProcess(ENGINE_PROCESS, setup_of(model, place), answer_timeout=answer_timeout(model))
    engine.await_ready(start_timeout(model))
    return engine


def _start_one_of_many(model: OpenModel, place: ReplicaPlace) -> Engine:
    """The engine of a process that is one of several replicas, each started by the user. First they compare what must
    be the same for all."""
    place = replace_fields(place, meeting=next(_meetings))
    with ExitStack() as stack:
        if place.rank == 0:
            with suppress(AddressInUse):  # it is open already, for the results
                address = Address.parse(place.rendezvous)
                stack.enter_context(Rendezvous(address.host, address.port, key=place.key))
        if shares_experts(model.decision.cutting):  # it goes on when others have work and this process has none
            engine = _start_process(model, place)
            return ReplicaSet(
                {place.rank: engine},
                {place.rank: room_of(model, engine.stats())},
                together=True,
                on_close=stack.pop_all().close,
            )
        told = agreement(model.options, model.decision)
        RendezvousLockstep(place, told, timeout=model.options.parallel.start_timeout).close()
        return _start_alone(model, replace_fields(place, rendezvous="", key=""))  # they have met


def _start_replicas(model: OpenModel) -> ReplicaSet:
    together = shares_experts(model.decision.cutting)
    with ExitStack() as stack:
        launch = _on_threads(model) if model.decision.backend == "threads" else _as_processes(model, stack)
        replicas: dict[int, Replica] = {}
        try:
            for number in range(model.options.parallel.data_parallel_size):
                replicas[number] = launch(number)
        except BaseException:
            close_all(list(replicas.values()))
            raise
        found = await_ready(replicas, start_timeout(model))
        rooms = {number: room_of(model, stats) for number, stats in found.items()}
        return ReplicaSet(replicas, rooms, together=together, on_close=stack.pop_all().close)


def _as_processes(model: OpenModel, stack: ExitStack) -> Callable[[int], Replica]:
    """Starts one. Those that compute together meet at a rendezvous of this process."""
    rendezvous, key = "", ""
    if shares_experts(model.decision.cutting):
        key = secrets.token_hex(KEY_BYTES)
        rendezvous = stack.enter_context(Rendezvous(key=key)).address

    def launch(number: int) -> Replica:
        place = replace_fields(place_of(model, number), rendezvous=rendezvous, key=key)
        return EngineProcess(ENGINE_PROCESS, setup_of(model, place), answer_timeout=answer_timeout(model))

    return launch


def _on_threads(model: OpenModel) -> Callable[[int], Replica]:
    size = model.options.parallel.data_parallel_size
    locksteps = LocalLockstep.of(size) if shares_experts(model.decision.cutting) else [None] * size
    groups = shared_groups(model.options)

    def start(setup: EngineSetup, lockstep: Joined | None) -> EngineCore:
        decision = decide(model.options, setup.place, model.files)
        return build_engine(model.options, decision, lockstep=lockstep, groups=groups)

    def run(channel: Channel) -> None:
        serve(channel, lambda setup: locksteps[setup.place.rank], start)

    def launch(number: int) -> Replica:
        setup = setup_of(model, place_of(model, number))
        return EngineThread(run, setup, answer_timeout=answer_timeout(model))

    return launch


def place_of(model: OpenModel, number: int, local: Sequence[int] | None = None) -> ReplicaPlace:
    """Of one replica; `local` are those on this host, without it all. One may have a number beyond those that were
    planned: it was added later."""
    size = max(model.options.parallel.data_parallel_size, number + 1)
    available = model.decision.hardware.host_memory_available
    if local is None or len(local) == size:
        return ReplicaPlace(number, size, local_rank=number, local_size=size, memory_available=available)
    position = local.index(number) if number in local else len(local)
    count = max(len(local), position + 1)
    return ReplicaPlace(number, size, local_rank=position, local_size=count, memory_available=available)


def setup_of(model: OpenModel, place: ReplicaPlace) -> EngineSetup:
    options = {name: value for name, value in model.given.items() if name != "engine_process"}
    if place.local_rank >= model.decision.place.local_size:
        options |= _kv_cache_of_added(model, place.local_rank + 1)
    return EngineSetup(model.options.model, options, place, model.files)


def _kv_cache_of_added(model: OpenModel, replicas: int) -> dict[str, Any]:
    """Options for a replica that was added to those that were planned. Its share of a CPU host's memory would be
    smaller than theirs, and too small for requests that they hold: it gets what each of them has, if there is so much.
    """
    decision, cache = model.decision, model.options.cache
    budgets = [budget for budget in decision.kv_budgets if budget is not None]
    asked = cache.kv_cache_memory_bytes is not None or cache.device_memory is not None
    if decision.hardware.device != "cpu" or asked or not budgets:
        return {}
    needs = sum(rank.weights + rank.activations for rank in decision.ranks) + sum(budgets)
    if replicas * needs > decision.hardware.host_memory_available:
        return {}
    return {"kv_cache_memory_bytes": max(budgets)}


def room_of(model: OpenModel, stats: EngineStats) -> ReplicaCapacity:
    caching = model.options.cache.enable_prefix_caching
    return ReplicaCapacity(
        requests=most_held(model.options.scheduler.max_num_seqs),
        tokens=stats.num_blocks * stats.block_size,
        block_size=stats.block_size,
        prefixes=stats.num_blocks if caching else 0,
    )


def start_timeout(model: OpenModel) -> float:
    return model.options.parallel.start_timeout * _START_PHASES


def answer_timeout(model: OpenModel) -> float:
    """An engine answers between steps."""
    return model.options.parallel.step_timeout * (model.decision.max_in_flight + 1)
