"""The nodes of replicas as actors of a Ray cluster: placed by Ray, started by Ray, and restarted by Ray."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shoal import env
from shoal.addresses import Address
from shoal.config.engine_options import EngineOptions
from shoal.config.engine_options import options as engine_options
from shoal.errors import ConfigError, EngineError, ShoalError
from shoal.launch.credentials import credentials_of_host
from shoal.launch.deployment import NodeGroup
from shoal.launch.open_model import OpenModel
from shoal.launch.ray import cluster
from shoal.launch.ray.bundles import (
    Resources,
    bundle_sizes,
    check_resources,
    check_totals,
    ranks_of_bundles,
    shares_gpu,
    shown,
)
from shoal.launch.ray.node_actor import NodeActor, NodeOrder
from shoal.lazy import load
from shoal.log import get_logger
from shoal.planner.placement import TP_ACROSS
from shoal.values import numbered

log = get_logger("ray")

_REPORT_S = 10.0  # how often the log says which resources are missing
_SLICE_S = 0.5
_STOP_S = 5.0  # how long actors may take to end their ranks
_KEY_BYTES = 32
_PINNED = 0.001  # of the resource that each node of a cluster has by its address


@dataclass(slots=True)
class _Placed:
    """The placement group and the actors of one replica."""

    group: Any
    actors: list[Any] = field(default_factory=list)
    runs: list[Any] = field(default_factory=list)  # Ray's references to the results of `NodeActor.run`


class RayNodes:
    """Starts the nodes of replicas in a Ray cluster. `group` describes them for the leader."""

    def __init__(self, model: OpenModel) -> None:
        """Connect to Ray, and decide on the bundles of a replica.

        Raises:
            ConfigError: Ray is not there, or the cluster is too small.
        """
        options = model.options
        cluster.connect(options.nodes.ray_address, "--distributed-executor-backend ray")
        self._model = model
        self._given = cluster.given_group()
        self._each = _resources_of_rank(options)
        check_resources(self._each)
        _warn_of_memory(options, self._each)
        parallel = options.parallel
        self._world = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        self._replicas = parallel.data_parallel_size
        self._indices: list[dict[int, int]] = []  # for each replica: bundle of the given group -> number of ranks
        self._sizes = self._bundle_sizes()
        size = 1 + self._replicas * len(self._sizes)
        address = named[1] if (named := env.host_ip()) else cluster.own_address()
        key = env.cluster_key() or secrets.token_hex(_KEY_BYTES)
        credentials = credentials_of_host(options.tls, key)
        self.group = NodeGroup(size, 0, self._replicas, Address(address, 0), credentials, leader_has_ranks=False)
        self._placed: dict[int, _Placed] = {}

    def _bundle_sizes(self) -> list[int]:
        """Return the number of ranks of each bundle of a replica."""
        options = self._model.options
        if self._given is not None:
            self._indices = _divide_given(self._given, self._each, self._world, self._replicas)
            divided = [list(each.values()) for each in self._indices]
            if len({len(each) for each in divided}) > 1:
                raise ConfigError(
                    f"the {self._replicas} replicas would have {', '.join(str(len(each)) for each in divided)} bundles "
                    "of the placement group of this process: give all bundles the same size"
                )
            return divided[0]
        nodes = cluster.nodes()
        sizes = bundle_sizes(
            nodes,
            self._each,
            tp=options.parallel.tensor_parallel_size,
            stages=options.parallel.pipeline_parallel_size,
            wanted=options.nodes.placement,
        )
        check_totals(nodes, self._each, sizes)
        return sizes

    def start(self, replica: int, leader: str, timeout: float, cancelled: Callable[[], bool]) -> None:
        """Start the actors of a replica, if they do not run. Wait until Ray has placed them.

        Args:
            leader: host:port where they must come.

        Raises:
            ConfigError: Ray cannot place them within `timeout` seconds; the message says what is missing, who has it.
            EngineError: `cancelled` returned True.
        """
        if replica in self._placed:
            return
        if self._given is not None:
            if replica >= len(self._indices):
                raise ConfigError("a replica cannot be added: the placement group of this process has no bundles left")
            placed = _Placed(self._given.group)
            bundles = list(self._indices[replica].items())
        else:
            placed = _Placed(self._make_group(replica))
            bundles = list(enumerate(self._sizes))
        self._placed[replica] = placed
        try:
            self._await_group(placed.group, timeout, cancelled)
            first = 0
            for place, (index, ranks) in enumerate(bundles):
                number = self.group.of_replica(replica)[place]
                self._start_actor(placed, replica, number, index, range(first, first + ranks), leader)
                first += ranks
        except BaseException:
            self.release(replica)
            raise

    def _make_group(self, replica: int) -> Any:
        placement = self._model.options.nodes.placement
        bundles = [{name: amount * ranks for name, amount in self._each.items()} for ranks in self._sizes]
        if not isinstance(placement, str):
            for bundle, (host, _) in zip(bundles, placement, strict=True):
                if not host.isdigit():
                    bundle[f"node:{host}"] = _PINNED
        strategy = "STRICT_SPREAD" if placement == TP_ACROSS else "PACK"
        log.info(
            "replica %d asks Ray for %s (%s): %s of %s ranks",
            *(replica, " + ".join(map(shown, bundles)), strategy, numbered(len(bundles), "bundle")),
            " + ".join(map(str, self._sizes)),
        )
        return load("ray.util.placement_group:placement_group")(
            bundles, strategy=strategy, name=f"shoal-replica-{replica}"
        )

    def _await_group(self, group: Any, timeout: float, cancelled: Callable[[], bool]) -> None:
        begun = last_report = time.monotonic()
        while not group.wait(timeout_seconds=_SLICE_S):
            now = time.monotonic()
            if cancelled():
                raise EngineError("the wait for resources of Ray was cancelled")
            if now - begun > timeout:
                raise ConfigError(
                    f"Ray has not placed the ranks within {timeout:g} s: {self._describe_shortage(group)}"
                )
            if now - last_report >= _REPORT_S:
                last_report = now
                log.warning("waiting for Ray, %.0f s of %g: %s", now - begun, timeout, self._describe_shortage(group))

    def _describe_shortage(self, group: Any) -> str:
        asked = " + ".join(shown(bundle) for bundle in group.bundle_specs)
        free = "; ".join(
            f"{node.address} has {shown({name: node.available.get(name, 0) for name in self._each})} free of "
            f"{shown({name: node.total.get(name, 0) for name in self._each})}"
            for node in cluster.nodes()
        )
        return f"it asks for {asked}; {free}; held by {cluster.holders()}"

    def _start_actor(self, placed: _Placed, replica: int, number: int, bundle: int, ranks: range, leader: str) -> None:
        named = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        resources = {name: amount * len(ranks) for name, amount in self._each.items()}
        strategy = load("ray.util.scheduling_strategies:PlacementGroupSchedulingStrategy")(
            placement_group=placed.group, placement_group_bundle_index=bundle
        )
        order = NodeOrder(
            model=self._model.options.model,
            options={name: value for name, value in self._model.given.items() if name not in _ONLY_LEADER},
            number=number,
            size=self.group.size,
            ranks=len(ranks),
            leader=leader,
            key=self.group.credentials.key,
            online=self._model.online,
        )
        actor = (
            load("ray:remote")(NodeActor)
            .options(
                name=f"shoal-{Address.parse(leader).port}-replica-{replica}-rank-{named}",
                num_cpus=resources.pop("CPU", 0),
                num_gpus=resources.pop("GPU", 0),
                memory=resources.pop("memory", None),
                resources=resources,
                scheduling_strategy=strategy,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=2,
                runtime_env={"env_vars": env.shared_variables(option.name for option in engine_options())},
            )
            .remote(order)
        )
        placed.actors.append(actor)
        placed.runs.append(actor.run.remote())

    def check(self, replica: int) -> None:
        """Check that no actor of a replica has given up.

        Raises:
            ShoalError: one has; the error is its own.
        """
        placed = self._placed.get(replica)
        if placed is None:
            return
        ended, _ = load("ray:wait")(placed.runs, num_returns=len(placed.runs), timeout=0)
        for run in ended:
            try:
                load("ray:get")(run)
            except Exception as error:  # noqa: BLE001 - Ray wraps what the actor raised
                cause = getattr(error, "cause", None)
                why = (
                    cause
                    if isinstance(cause, ShoalError)
                    else EngineError(f"an actor of Ray has ended: {_first_line(error)}")
                )
                self.release(replica)
                raise why from None
            self.release(replica)
            raise EngineError("an actor of Ray has ended before its work was done")

    def describe(self, replica: int) -> str:
        """Return what Ray waits for, or that it has placed all nodes of a replica."""
        placed = self._placed.get(replica)
        if placed is None:
            return "they were released"
        table = load("ray.util:placement_group_table")(placed.group)
        if table["state"] != "CREATED":
            return f"Ray has no place for them: {self._describe_shortage(placed.group)}"
        return "Ray has placed them, and starts them"

    def release(self, replica: int) -> None:
        """End the actors of a replica, and give their resources back. Idempotent, never raises."""
        placed = self._placed.pop(replica, None)
        if placed is None:
            return
        try:
            stops = [actor.stop.remote() for actor in placed.actors]
            if stops:
                load("ray:wait")(stops, num_returns=len(stops), timeout=_STOP_S)
            for actor in placed.actors:
                load("ray:kill")(actor)
            if self._given is None:
                load("ray.util:remove_placement_group")(placed.group)
        except Exception as error:  # noqa: BLE001 - the cluster may be gone
            log.warning("replica %d could not give its resources back to Ray: %s", replica, _first_line(error))

    def close(self) -> None:
        """End all actors. Idempotent, never raises."""
        for replica in list(self._placed):
            self.release(replica)


# Options that are for the leader alone.
_ONLY_LEADER = (
    "distributed_executor_backend",
    "data_parallel_backend",
    "ray_address",
    "ray_resources",
    "topology",
    "measure_links",
)


def _resources_of_rank(options: EngineOptions) -> Resources:
    """Return the resources that Ray counts for one rank."""
    if options.nodes.ray_resources:
        return options.nodes.ray_resources
    has_gpus = any(node.total.get("GPU", 0) > 0 for node in cluster.nodes())
    wanted = options.parallel.device
    if wanted == "cuda" or (wanted == "auto" and has_gpus):
        return {"GPU": env.ray_gpus_per_rank() or 1.0}
    return {"CPU": 1.0}


def _warn_of_memory(options: EngineOptions, each: Resources) -> None:
    """Warn if ranks that take parts of GPUs take more of their memory."""
    part, utilization = each.get("GPU", 0.0), options.cache.gpu_memory_utilization
    if shares_gpu(each) and options.parallel.device != "cpu" and utilization > part:
        log.warning(
            "each rank takes %g of a GPU, but --gpu-memory-utilization is %g of its memory: give at most %g, or the "
            "others on that GPU have too little",
            *(part, utilization, part),
        )


def _divide_given(given: cluster.GivenGroup, each: Resources, world: int, replicas: int) -> list[dict[int, int]]:
    """Return the bundles of each replica in a placement group that somebody else has made."""
    divided: list[dict[int, int]] = []
    bundles = [dict(bundle) for bundle in given.bundles]
    for _ in range(replicas):
        found = ranks_of_bundles(bundles, each, world, given.own)
        for index in found:
            bundles[index] = {}
        divided.append(found)
    return divided


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
