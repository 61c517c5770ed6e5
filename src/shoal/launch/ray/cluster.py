"""A Ray cluster as this process sees it: whether it is there, its nodes, and the placement group of this process."""

import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import addresses, env
from shoal.addresses import Address
from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.launch.ray.bundles import ClusterNode, Resources, own_share
from shoal.lazy import load
from shoal.log import get_logger

log = get_logger("ray")

_CONNECT_S = 5.0
_LOCAL_CLUSTER = Path("/tmp/ray/ray_current_cluster")  # written by `ray start` on this host
_OTHER_VERSIONS = "Version mismatch"  # how Ray's error begins if the cluster has other versions than this process
_INSTALL = "it needs Ray: pip install 'shoal[ray]'"


@dataclass(frozen=True, slots=True)
class GivenGroup:
    """The placement group in which this process runs, such as that of a Ray job or of Ray Serve."""

    group: Any
    bundles: tuple[Resources, ...]
    own: Mapping[int, Resources]  # what this process uses of each bundle


@dataclass(frozen=True, slots=True)
class DeadNode:
    """A node that was in the cluster."""

    id: str
    address: str
    reason: str


def connect(address: str | None, flag: str, *, own_cluster: bool = True, show_tasks: bool = True) -> None:
    """Connect this process to the Ray cluster that is named or found, unless it is connected.

    Args:
        address: host:port, as --ray-address; None: RAY_ADDRESS, or the cluster of this host.
        flag: the option that asks for Ray, for messages.
        own_cluster: if there is no cluster, start one for this process alone.
        show_tasks: print what tasks and actors print.

    Raises:
        ConfigError: Ray is not installed; there is no cluster; it cannot be reached, or has another version of Ray.
    """
    try:
        is_initialized, init = load("ray:is_initialized"), load("ray:init")
    except ImportError:
        raise ConfigError(f"{flag}: {_INSTALL}") from None
    if is_initialized():
        return
    wanted = address or env.ray_address()
    if not own_cluster and wanted in ("", "auto", "local") and not _LOCAL_CLUSTER.exists():
        raise ConfigError(
            f"{flag}: no Ray cluster runs on this host; start Ray with `ray start`, or give the address of the cluster "
            "with --ray-address HOST:PORT"
        )
    if wanted and wanted not in ("auto", "local") and "://" not in wanted:
        _check_reachable(wanted)
    there = wanted or ("auto" if _LOCAL_CLUSTER.exists() else "local")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        init(
            address=there,
            log_to_driver=show_tasks,
            configure_logging=False,
            include_dashboard=False if there == "local" else None,
        )
    except Exception as error:  # noqa: BLE001 - Ray raises RuntimeError, ConnectionError, ValueError and others
        why = " ".join(str(error).split())
        if why.startswith(_OTHER_VERSIONS):
            why = f"{why.rstrip('.')}; install the same versions of Ray and Python on all hosts"
        raise ConfigError(f"Ray cannot be used at {there}: {why}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has replaced it
    load("ray:put")(None)  # Ray loads modules for this, which must not happen on several threads at the same time
    log.info(
        "connected to Ray at %s",
        load("ray:get_runtime_context")().gcs_address if there != "local" else "a cluster of its own",
    )


def disconnect() -> None:
    """End the connection of this process. Idempotent."""
    if is_connected():
        load("ray:shutdown")()


def _check_reachable(address: str) -> None:
    try:
        addresses.connect(Address.parse(address), _CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"--ray-address {address}: no answer ({error.strerror or error}); start Ray there with `ray start --head`, "
            "or give the address that it has printed"
        ) from None


def is_reachable(options: EngineOptions) -> bool:
    """Return whether a Ray cluster seems to be there for this process: connected, named, or started on this host."""
    return is_connected() or bool(options.nodes.ray_address or env.ray_address()) or _LOCAL_CLUSTER.exists()


def is_connected() -> bool:
    """Return whether this process is connected to a Ray cluster. It loads nothing of Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(getattr(ray, "is_initialized", lambda: False)())


def given_group() -> GivenGroup | None:
    """Return the placement group in which this process runs; None if it runs in none, or not in Ray."""
    if not is_connected():
        return None
    group = load("ray.util:get_current_placement_group")()
    if group is None:
        return None
    return GivenGroup(group, tuple(group.bundle_specs), own_share(_own_resources()))


def _own_resources() -> dict[str, float]:
    """Return the resources that Ray counts for this process, by the names of its placement group.

    The public `get_assigned_resources` does not tell from which bundles they are.
    """
    with suppress(Exception):  # a driver has no resources
        ids = load("ray._private.worker:global_worker").core_worker.resource_ids()
        return {name: sum(amount for _, amount in parts) for name, parts in ids.items()}
    return {}


def nodes() -> list[ClusterNode]:
    """Return the nodes of the cluster that are alive."""
    free = load("ray._private.state:available_resources_per_node")()
    return [
        ClusterNode(each["NodeID"], each["NodeManagerAddress"], each["Resources"], free.get(each["NodeID"], {}))
        for each in load("ray:nodes")()
        if each["Alive"]
    ]


def dead_nodes() -> list[DeadNode]:
    """Return the nodes that have left the cluster or are lost, as far as the cluster remembers them."""
    return [
        DeadNode(each["NodeID"], each["NodeManagerAddress"], each.get("DeathReasonMessage") or "no reason is known")
        for each in load("ray:nodes")()
        if not each["Alive"]
    ]


def own_address() -> str:
    """Return the address of this host that Ray uses."""
    return str(load("ray.util:get_node_ip_address")())


def holders() -> str:
    """Return who holds resources of the cluster, as far as placement groups tell."""
    table = load("ray.util:placement_group_table")()
    held = [
        f"{entry.get('name') or entry['placement_group_id'][:8]} has {_total(entry['bundles'])}"
        for entry in table.values()
        if entry["state"] == "CREATED"
    ]
    return "; ".join(held) or "no placement group"


def _total(bundles: Mapping[Any, Mapping[str, float]]) -> str:
    total: dict[str, float] = {}
    for bundle in bundles.values():
        for name, amount in bundle.items():
            total[name] = total.get(name, 0) + amount
    return ", ".join(f"{amount:g} {name}" for name, amount in total.items())
