"""Warm spares: processes that have loaded everything, and from which a rank that dies is replaced at once."""

from collections.abc import Sequence

from shoal.errors import ConfigError
from shoal.planner.memory import RankMemory
from shoal.planner.placement import ReplicaHost
from shoal.values import format_bytes
from shoal.wire.base import Ids
from shoal.wire.plan import Layout, ReplicaPlace

# The memory of the host that is set aside for a spare. On a CPU 150 MiB were measured, most of which ranks that were
# forked from it share; PyTorch for GPUs was not measured.
_SPARE_BYTES = {"cpu": 256 * 2**20, "cuda": 512 * 2**20}

_ENOUGH = 1  # spares of a replica on a host: any number of ranks are forked from one


def warm_spares(
    hosts: Sequence[ReplicaHost],
    placed: Sequence[Ids],
    memories: Sequence[RankMemory],
    blocks: int | None,
    layout: Layout,
    place: ReplicaPlace,
    *,
    executor: str,
    online: bool,
    reasons: list[str],
    warnings: list[str],
) -> Ids:
    """Return how many warm spares a replica keeps on each of its hosts: none or one.

    By default it keeps one while serving, if memory allows.

    Args:
        placed: the ranks of each host.
        memories: what each rank needs.
        blocks: the number of KV blocks of each rank; None: ranks measure it on their devices.
        place: the place of the replica. The replicas of a host share its memory.
        executor: the name of the executor.
        online: True for servers.
        reasons, warnings: lines for the log; this function appends its own.

    Raises:
        ConfigError: the memory of a host does not suffice for as many as were asked for there.
    """
    counts = []
    why_useless = _why_useless(executor)
    replicas = max(place.local_size, place.local_rank + 1)
    for host, ranks in zip(hosts, placed, strict=True):
        asked = host.options.parallel.warm_spares
        if asked and why_useless:
            warnings.append(f"--warm-spares {asked} changes nothing: {why_useless}")
        by_default = 1 if online and (layout.num_ranks > 1 or layout.shares_experts) else 0
        count = by_default if asked is None else min(asked, _ENOUGH)
        if asked and asked > _ENOUGH:
            warnings.append(f"--warm-spares {asked}: a host keeps one for each replica, enough for all its ranks")
        if not count or why_useless or not place.local_size:
            counts.append(0)
            continue
        needs = sum(memories[rank].weights + memories[rank].activations for rank in ranks)
        needs += sum((blocks or 0) * memories[rank].block for rank in ranks)
        counts.append(_ENOUGH if _fits(host, replicas, replicas * needs, reasons) else 0)
    return tuple(counts)


def _why_useless(executor: str) -> str:
    """Return why no rank could be replaced by a spare; "" if one could be."""
    if executor in ("uni", "threads"):
        return f"ranks of the executor {executor} are no processes of their own, so that none can be replaced"
    return ""


def _fits(host: ReplicaHost, replicas: int, needs: int, reasons: list[str]) -> bool:
    """Tell whether the memory of the host suffices for a spare of each replica.

    Args:
        needs: the bytes that the ranks of all replicas need.

    Raises:
        ConfigError: it does not suffice, and the user asked for spares.
    """
    hardware, asked = host.facts.hardware, host.options.parallel.warm_spares is not None
    each = _SPARE_BYTES[hardware.device]
    left = max(hardware.host_memory_available - (needs if hardware.device == "cpu" else 0), 0)
    name = f" on {host.facts.name}" if host.address else ""
    spares = f"1 warm spare for each replica{name}"
    size = f"of {format_bytes(each)}"
    if replicas * each <= left:
        why = "as --warm-spares asks" if asked else "so that a rank that dies is replaced at once"
        reasons.append(f"{spares}, {size}: {why}")
        return True
    missing = f"{replicas} {size} need more than the {format_bytes(left)} that the ranks leave available"
    if asked:
        raise ConfigError(f"{spares}: {missing}; give --warm-spares 0, or lower --kv-cache-memory-bytes")
    reasons.append(f"no warm spares{name}: {missing}")
    return False
