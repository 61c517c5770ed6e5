"""The engine of a program, which may be one of several processes that run the same program and make the same calls."""

from shoal.launch.credentials import credentials_of_host
from shoal.launch.early_failure import report_refusal
from shoal.launch.followed_engine import FollowedEngine
from shoal.launch.followers import Followers
from shoal.launch.headless import introduce_host
from shoal.launch.host_network import warn_of_kernel_ports
from shoal.launch.node import BackgroundNode
from shoal.launch.offline_engines import start_engine
from shoal.launch.open_model import OpenModel
from shoal.launch.shared_calls import OwnCalls, SharedCalls
from shoal.log import get_logger
from shoal.protocols import Engine
from shoal.transport.connecting import RefusedUnknown
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.calls import FOLLOWERS_DOOR

log = get_logger("program")


def start_program(model: OpenModel) -> tuple[Engine, SharedCalls]:
    """Start the engine of a program, or wait for that of the process that leads.

    Returns:
        The engine, and the way in which calls are made on it.

    Raises:
        UserError, EngineError: it could not start; no process is left running.
    """
    rank, size = _place(model)
    if size == 1:
        return start_engine(model), OwnCalls()
    if rank:
        engine = _follow(model, rank, size)
        return engine, engine
    return _lead(model, size)


def _place(model: OpenModel) -> tuple[int, int]:
    """Return the number of this process among those that run the program, and their number."""
    if model.job is not None:
        return model.job.place.rank, model.job.place.size
    if model.own_process:  # a command, whose nodes follow no calls
        return 0, 1
    nodes = model.options.nodes
    return nodes.node_rank, nodes.nnodes + nodes.spare_hosts


def _lead(model: OpenModel, size: int) -> tuple[Engine, SharedCalls]:
    log.info("this is rank 0 of %d processes that make the same calls: it has the engine", size)
    followers = Followers(size, model.agreement)
    try:
        if model.job is not None and model.node_group is None:
            where = model.job.address
            credentials = credentials_of_host(model.options.tls, model.job.key)
            rendezvous = Rendezvous(where.host, where.port, credentials=credentials, doors={FOLLOWERS_DOOR: followers})
            followers.on_close([rendezvous.close])
        engine = start_engine(model, followers)
        try:
            if model.job is not None:
                model.job.release_port()
                followers.await_all(model.plan.timeouts.start_s)
            followers.tell_ready(engine.stats())
        except BaseException:
            engine.close()
            raise
    except BaseException as error:
        followers.dismiss(error)
        raise
    return engine, followers


def _follow(model: OpenModel, rank: int, size: int) -> FollowedEngine:
    log.info("this is rank %d of %d processes that make the same calls: it gets the outputs of rank 0", rank, size)
    group, job, timeout = model.node_group, model.job, model.options.parallel.start_timeout
    node = None
    if group is not None and (job is None or (job.place.local_rank == 0 and group.rank)):
        warn_of_kernel_ports(model.options)
        report, agreement = introduce_host(model.options, model.given, group.address.host)
        node = BackgroundNode(group, model.options, report, agreement)
    meeting = job or group
    assert meeting is not None
    try:
        return FollowedEngine(
            meeting.address,
            credentials_of_host(model.options.tls, None if job is None else job.key),
            rank=rank,
            size=size,
            agreement={} if node else model.agreement,
            timeout=timeout,
            node=node,
        )
    except RefusedUnknown as error:
        if group is not None:
            report_refusal(group, error)
        raise
