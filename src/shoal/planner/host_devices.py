"""The devices and cores of a host: what there is, what may be used, and what each rank gets."""

import dataclasses
import math
import socket
from collections.abc import Sequence

from shoal import env
from shoal.config.engine_options import EngineOptions
from shoal.devices import cpu, cuda
from shoal.devices.hardware import Hardware
from shoal.devices.numa import share_cores
from shoal.errors import ConfigError
from shoal.wire.base import Ids
from shoal.wire.hosts import HostFacts
from shoal.wire.plan import RankPlan, ReplicaPlace


def discover(options: EngineOptions) -> Hardware:
    """Return the hardware of this host that the options allow to be used.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    wanted, count = options.parallel.device, options.parallel.num_devices
    if wanted == "cuda" and not cuda.torch_has_cuda():
        raise ConfigError(
            "--device cuda: the installed PyTorch has no CUDA; install a build with CUDA, or use --device cpu"
        )
    found = cuda.discover(count) if wanted != "cpu" and cuda.torch_has_cuda() else None
    if found is None and wanted == "cuda":
        hidden = cuda.describe_visibility(env.visible_cuda_devices())
        raise ConfigError(f"--device cuda: this host shows no CUDA device{hidden}; use --device cpu")
    return found or cpu.discover(count)


def describe_host(options: EngineOptions, *, has_replicas: bool = True) -> HostFacts:
    """Return this host, as a planner needs to know it.

    Args:
        has_replicas: False for a front end without replicas of its own: it needs no devices, so it does not matter
            which are found.

    Raises:
        ConfigError: a GPU is asked for and there is none; or VLLM_CPU_KVCACHE_SPACE is no size.
    """
    hardware = discover(options) if has_replicas else cpu.discover()
    return HostFacts(socket.gethostname(), hardware, env.cpu_kv_cache_bytes())


def restrict_cores(options: EngineOptions, ranks: int, hardware: Hardware, reasons: list[str]) -> Hardware:
    """Return the hardware, restricted to the cores that --cpu-cores names for the `ranks` that the host runs.

    Raises:
        ConfigError: --cpu-cores names cores that this process may not use, or does not have one list for each rank.
    """
    lists = options.parallel.cpu_cores
    if not lists:
        return hardware
    named = tuple(sorted(core for each in lists for core in each))
    forbidden = [core for core in named if core not in hardware.cores]
    if forbidden:
        raise ConfigError(
            f"--cpu-cores (or VLLM_CPU_OMP_THREADS_BIND) names {', '.join(map(str, forbidden[:5]))}, which this "
            f"process may not use: it may use {', '.join(map(str, hardware.cores))}"
        )
    if len(lists) not in (1, ranks):
        raise ConfigError(
            f"--cpu-cores has {len(lists)} lists, but this host runs {ranks} ranks: give one list for each rank, or "
            "one list for all of them"
        )
    reasons.append(f"cores {'|'.join(','.join(map(str, each)) for each in lists)}: as --cpu-cores asks")
    cores_are_devices = hardware.device == "cpu" and options.parallel.num_devices is None
    return dataclasses.replace(
        hardware, cores=named, num_devices=len(named) if cores_are_devices else hardware.num_devices
    )


def device_of(order: Ids, index: int) -> int:
    """Return the device of a rank, from its number among the ranks of its host.

    Args:
        order: the order in which ranks take the devices; (): that of their numbers.
    """
    return order[index] if index < len(order) else index


def check_devices(
    options: EngineOptions,
    place: ReplicaPlace,
    hardware: Hardware,
    reasons: list[str],
    warnings: list[str],
    order: Ids = (),
) -> None:
    """Check that the host has a device for each rank of its replicas, or devices that ranks can share.

    Appends to the reasons which devices this replica gets, or to the warnings that ranks share devices. `order`: see
    `device_of`.

    Raises:
        ConfigError: there are not enough devices, and ranks cannot share them.
    """
    sizes = {
        "--tensor-parallel-size": options.parallel.tensor_parallel_size,
        "--pipeline-parallel-size": options.parallel.pipeline_parallel_size,
        "--data-parallel-size": place.local_size,
    }
    ranks, count = math.prod(sizes.values()), hardware.num_devices
    kind = {"cpu": "CPU cores", "cuda": "GPUs"}[hardware.device]
    named = {flag: size for flag, size in sizes.items() if size > 1}
    product = f"{' x '.join(map(str, named.values()))} = {ranks}" if len(named) > 1 else str(ranks)
    if ranks <= count:
        reasons.append(f"{product} rank{'s' if ranks > 1 else ''} on {count} {kind}")
        world = ranks // place.local_size
        first = place.local_rank * world
        reasons.extend(
            f"rank {rank} on cuda:{index} (CUDA_VISIBLE_DEVICES entry {hardware.visible[index]})"
            for rank, index in ((rank, device_of(order, first + rank)) for rank in range(world))
            if hardware.visible
        )
    elif hardware.devices_shareable:
        warnings.append(f"{product} ranks share {count} {kind}: they are oversubscribed, and steps will be slow")
    else:
        asked = " x ".join(f"{flag} {size}" for flag, size in named.items())
        shown = cuda.describe_visibility(hardware.visible_devices)
        less = f"Use {next(iter(named))} {count} or fewer" if len(named) == 1 else f"Lower them to {count} or fewer"
        way_out = "raise --num-devices" if hardware.device == "cpu" else "use --device cpu"
        raise ConfigError(
            f"{asked} needs {product} devices; this host has {count} ({hardware.device}){shown}. {less}, or {way_out}"
        )


def rank_cores(options: EngineOptions, hardware: Hardware, place: ReplicaPlace, ranks: int) -> tuple[Ids, ...]:
    """Return the CPU cores of each of a replica's `ranks` ranks on a host. The replicas of a host divide its cores.

    Without a list for each rank, a rank has cores of one NUMA node where they fit.
    """
    first, lists = place.local_rank * ranks, options.parallel.cpu_cores
    if place.local_size and lists is not None and len(lists) > 1:
        return lists[first : first + ranks]
    count = max(place.local_size, 1) * ranks
    return share_cores(hardware.cores, count, hardware.nodes)[first : first + ranks]


def describe_nodes(ranks: Sequence[RankPlan], facts: Sequence[HostFacts]) -> list[str]:
    """Return a line for each host that has several NUMA nodes: whose memory each rank prefers."""
    lines = []
    for number, host in enumerate(facts):
        if host.hardware.nodes:
            near = (f"rank {rank.rank} {_near(rank)}" for rank in ranks if rank.node == number)
            lines.append(f"{host.name}: cores and memory by NUMA node: {', '.join(near)}")
    return lines


def _near(rank: RankPlan) -> str:
    return "on no single node" if rank.numa_node is None else f"on node {rank.numa_node}"
