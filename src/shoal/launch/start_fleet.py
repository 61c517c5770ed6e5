"""The start of a fleet: the replicas of this host, and the door for those of other hosts."""

import secrets
from contextlib import ExitStack

from shoal.cluster.fleet import Fleet, ModelSummary
from shoal.cluster.limits import FleetLimits
from shoal.cluster.replicas.rendezvous_doors import FleetDoor, PeersDoor
from shoal.executors.table import EXECUTORS
from shoal.launch.credentials import log_protection
from shoal.launch.deployment import Deployment, Mode
from shoal.launch.host_network import leader_address, own_address
from shoal.launch.launchers import ProcessLauncher, ThreadLauncher, answer_timeout, capacity_of, start_timeout
from shoal.launch.leader import Leader, make_leader
from shoal.launch.offline_engines import KEY_BYTES
from shoal.launch.open_model import OpenModel
from shoal.protocols import Recorder
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.rendezvous import FRONT_END_DOOR, PEERS_DOOR


def start_fleet(model: OpenModel, recorder: Recorder | None = None) -> Fleet:
    """Return a fleet whose replicas on this host are starting, and whose other replicas are awaited.

    Raises:
        ConfigError: options about hosts contradict each other, or the address of the rendezvous cannot be used.
    """
    model.log_plan()
    parallel, serving = model.options.parallel, model.options.serving
    deployment = Deployment.of(model.options)
    fleets: list[Fleet] = []
    with ExitStack() as stack:
        door, leader = _front_door(model, deployment), make_leader(model)
        if leader is not None:
            stack.callback(_release_nodes, leader, fleets)
            rendezvous, credentials = leader.rendezvous, leader.credentials
        else:
            rendezvous, credentials = _open_rendezvous(model, deployment, door, stack)
        launch: ProcessLauncher | ThreadLauncher
        if EXECUTORS[model.plan.executor].replicas_are_threads:
            launch = ThreadLauncher(model)
        else:
            compared = deployment.local if deployment.mode is Mode.PEERS else ()
            launch = ProcessLauncher(
                model,
                deployment.local,
                rendezvous=rendezvous,
                credentials=credentials,
                compared=compared,
                leader=leader,
            )
        fleet = Fleet(
            launch,
            lambda stats: capacity_of(model, stats),
            model=ModelSummary(model.name, parallel.tensor_parallel_size, parallel.pipeline_parallel_size),
            limits=FleetLimits(
                max_queued=serving.max_queued_requests,
                max_wait=serving.max_queue_wait,
                timeout=serving.request_timeout,
                max_restarts=serving.max_restarts,
                start_timeout=start_timeout(model),
                answer_timeout=answer_timeout(model),
                max_model_len=model.plan.max_model_len,
            ),
            local=deployment.local,
            awaited=deployment.awaited,
            served_elsewhere=deployment.served_elsewhere,
            in_lockstep=model.plan.layout.shares_experts,
            recorder=recorder,
            on_close=stack.pop_all().close,
        )
        fleets.append(fleet)
        if door is not None:
            door.open(fleet.arrive)
        return fleet


def _release_nodes(leader: Leader, fleets: list[Fleet]) -> None:
    """End the nodes if the fleet could not work; else let them wait for the next front end."""
    error = fleets[0].fatal if fleets else None
    if error is None:
        leader.close()
    else:
        leader.dismiss(error)


def _front_door(model: OpenModel, deployment: Deployment) -> FleetDoor | None:
    """Return the door through which replicas of other hosts join; None if this process awaits none."""
    if deployment.mode is not Mode.HEAD:
        return None
    return FleetDoor(
        size=deployment.size,
        awaited=deployment.awaited,
        agreement=model.agreement,
        make_plan=model.plan_elsewhere,
        answer_timeout=answer_timeout(model),
    )


def _open_rendezvous(
    model: OpenModel, deployment: Deployment, door: FleetDoor | None, stack: ExitStack
) -> tuple[str, Credentials]:
    """Return the address of the rendezvous where this host's replicas meet others, and the credentials for it.

    If the rendezvous belongs to this process, it is opened here and closed with the `stack`. The address is empty
    if the replicas need not meet.
    """
    doors: dict[str, FleetDoor | PeersDoor] = {} if door is None else {FRONT_END_DOOR: door}
    if deployment.address is None:
        if not model.plan.layout.shares_experts or EXECUTORS[model.plan.executor].replicas_are_threads:
            return "", NO_CREDENTIALS
        credentials = Credentials(secrets.token_hex(KEY_BYTES))
        return stack.enter_context(Rendezvous(credentials=credentials, reopen_rooms=True)).address, credentials
    log_protection(deployment.credentials, deployment.address.host)
    if not deployment.listens:
        own_address(deployment.address.host)
    else:
        leader_address(deployment.address.host, "--data-parallel-address")
        if deployment.mode is Mode.PEERS:
            doors[PEERS_DOOR] = PeersDoor(size=deployment.size, agreement=model.agreement)
        host, port = deployment.address.host, deployment.address.port
        stack.enter_context(Rendezvous(host, port, credentials=deployment.credentials, doors=doors, reopen_rooms=True))
    return str(deployment.address), deployment.credentials
