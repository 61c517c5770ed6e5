"""From options to a fleet of replicas: on this host, and on others."""

import secrets
from collections.abc import Callable
from contextlib import ExitStack

from shoal.cluster.fleet import About, Fleet
from shoal.cluster.limits import FleetLimits
from shoal.cluster.lockstep.local import Joined, LocalLockstep
from shoal.cluster.members.arrival import FRONT_END, PEERS, FleetDoor, PeersDoor
from shoal.cluster.members.replica import EngineProcess, EngineThread, Replica
from shoal.config.engine_options import EngineOptions
from shoal.engine.core import EngineCore
from shoal.launch.build_engine import build_engine, shared_groups
from shoal.launch.deployment import Deployment, Mode
from shoal.launch.engine_server import serve
from shoal.launch.offline_engines import (
    ENGINE_PROCESS,
    KEY_BYTES,
    answer_timeout,
    place_of,
    room_of,
    setup_of,
    start_timeout,
)
from shoal.launch.open_model import OpenModel, decide
from shoal.planner.agreement import OF_RANKS, agreement
from shoal.planner.layout import shares_experts
from shoal.protocols import Recorder
from shoal.transport.channel import Channel
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import replace_fields
from shoal.wire.plan import EngineSetup

Launch = Callable[[int, int], Replica]


def start_fleet(model: OpenModel, recorder: Recorder | None = None) -> Fleet:
    """All replicas that the options ask for, each on its way up or awaited.

    Raises:
        ConfigError: options about hosts do not go together, or nobody can listen where the others come.
    """
    parallel, serving = model.options.parallel, model.options.serving
    deployment = Deployment.of(model.options)
    with ExitStack() as stack:
        door = _front_door(model, deployment)
        rendezvous, key = _meeting(model, deployment, door, stack)
        threads = model.decision.backend == "threads"
        launch = _on_threads(model) if threads else as_processes(model, deployment, rendezvous, key)
        fleet = Fleet(
            launch,
            lambda stats: room_of(model, stats),
            about=About(model.name, parallel.tensor_parallel_size, parallel.pipeline_parallel_size),
            limits=FleetLimits(
                max_queued=serving.max_queued_requests,
                max_wait=serving.max_queue_wait,
                timeout=serving.request_timeout,
                max_restarts=serving.max_restarts,
                start_timeout=start_timeout(model),
                answer_timeout=answer_timeout(model),
                max_model_len=model.decision.max_model_len,
            ),
            local=deployment.local,
            awaited=deployment.awaited,
            elsewhere=deployment.elsewhere,
            together=shares_experts(model.decision.cutting),
            recorder=recorder,
            on_close=stack.pop_all().close,
        )
        if door is not None:
            door.open(fleet.arrive)
        return fleet


def _front_door(model: OpenModel, deployment: Deployment) -> FleetDoor | None:
    """Where replicas of other hosts arrive, if any are awaited."""
    if deployment.mode is not Mode.HEAD:
        return None
    return FleetDoor(
        size=deployment.size,
        awaited=deployment.awaited,
        agreement=agreement(model.options, model.decision),
        answer_timeout=answer_timeout(model),
        uncompared=() if deployment.local else OF_RANKS,
    )


def _meeting(model: OpenModel, deployment: Deployment, door: FleetDoor | None, stack: ExitStack) -> tuple[str, str]:
    """Where the replicas of this process meet each other and those elsewhere, and the key for it; ("", "") if they need
    not. It is opened if that is here, and closed with the `stack`."""
    doors: dict[str, FleetDoor | PeersDoor] = {} if door is None else {FRONT_END: door}
    if deployment.address is None:
        if not shares_experts(model.decision.cutting) or model.decision.backend == "threads":
            return "", ""
        key = secrets.token_hex(KEY_BYTES)
        return stack.enter_context(Rendezvous(key=key, renewing=True)).address, key
    if deployment.listens:
        if deployment.mode is Mode.PEERS:
            doors[PEERS] = PeersDoor(size=deployment.size, agreement=agreement(model.options, model.decision))
        host, port, key = deployment.address.host, deployment.address.port, deployment.key
        stack.enter_context(Rendezvous(host, port, key=key, doors=doors, renewing=True))
    return str(deployment.address), deployment.key


def as_processes(model: OpenModel, deployment: Deployment, rendezvous: str, key: str) -> Launch:
    """Return a function that starts a replica as a process. Replicas that share experts meet at the `rendezvous`
    whenever they start. Other peers meet there at their first start, to compare their options, unless they were added
    while serving: then nobody else knows of them."""
    together = shares_experts(model.decision.cutting)
    started: set[int] = set()  # only what has been ready is started again

    def launch(number: int, generation: int) -> Replica:
        place = place_of(model, number, deployment.local)
        known = deployment.mode is Mode.PEERS and number in deployment.local
        if together or (known and number not in started):
            place = replace_fields(place, rendezvous=rendezvous, key=key, returning=number in started)
        started.add(number)
        return EngineProcess(ENGINE_PROCESS, setup_of(model, place), answer_timeout=answer_timeout(model))

    return launch


def _on_threads(model: OpenModel) -> Launch:
    """Ranks as threads; those that compute together have a lockstep and groups of their generation."""
    size = model.options.parallel.data_parallel_size
    together = shares_experts(model.decision.cutting)
    shared: dict[int, tuple[list[Joined | None], object]] = {}  # by generation

    def launch(number: int, generation: int) -> Replica:
        if generation not in shared or not together:
            locksteps: list[Joined | None] = [*LocalLockstep.of(size)] if together else []
            shared.clear()
            shared[generation] = (locksteps, shared_groups(model.options))
        locksteps, groups = shared[generation]

        def start(setup: EngineSetup, lockstep: Joined | None) -> EngineCore:
            options = EngineOptions.from_flat(setup.model, setup.options)
            return build_engine(options, decide(options, setup.place, model.files), lockstep=lockstep, groups=groups)

        def run(channel: Channel) -> None:
            serve(channel, lambda setup: locksteps[setup.place.rank] if together else None, start)

        return EngineThread(run, setup_of(model, place_of(model, number)), answer_timeout=answer_timeout(model))

    return launch
