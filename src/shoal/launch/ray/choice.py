"""The choice of Ray where the user has not chosen an executor."""

import dataclasses
import importlib.util
import math

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.launch.ray import cluster
from shoal.log import get_logger
from shoal.planner.host_devices import discover
from shoal.values import numbered

log = get_logger("ray")


def choose_executor(options: EngineOptions) -> EngineOptions:
    """Return the options, with the executor `ray` if Ray is to start the ranks. The log says why.

    That is so inside a placement group, and if this host has too few devices and a Ray cluster is there.
    """
    parallel = options.parallel
    if parallel.data_parallel_backend == "ray" and parallel.distributed_executor_backend == "auto":
        return _with_ray(options)
    others = options.hosts.data_parallel_address is not None or options.hosts.headless or options.nodes.nnodes > 1
    if parallel.distributed_executor_backend != "auto" or others or importlib.util.find_spec("ray") is None:
        return options
    if cluster.given_group() is not None:
        log.info("executor ray: this process runs in a placement group of Ray")
        return _with_ray(options)
    ranks = math.prod((parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size))
    if ranks == 1 or not cluster.is_reachable(options):
        return options
    devices = _num_devices(options)
    if ranks <= devices:
        return options
    log.info(
        "executor ray: %s, but this host has %s, and a Ray cluster is there (to run all ranks here, use "
        "--distributed-executor-backend mp)",
        *(numbered(ranks, "rank"), numbered(devices, "device")),
    )
    return _with_ray(options)


def _num_devices(options: EngineOptions) -> int:
    try:
        return discover(options).num_devices
    except ConfigError:  # there is none of the wanted kind here, but there may be some in the cluster
        return 0


def _with_ray(options: EngineOptions) -> EngineOptions:
    return dataclasses.replace(
        options, parallel=dataclasses.replace(options.parallel, distributed_executor_backend="ray")
    )
