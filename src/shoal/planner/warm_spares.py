"""The number of warm spares: processes that have loaded everything, and take the place of a rank that dies."""

from collections.abc import Sequence

from shoal.errors import ConfigError
from shoal.planner.memory import RankMemory
from shoal.planner.placement import ReplicaHost
from shoal.values import format_bytes
from shoal.wire.plan import Layout, ReplicaPlace

SPARE_BYTES = {"cpu": 256 * 2**20, "cuda": 512 * 2**20}  # host memory of a spare: about 150 MiB were measured on a CPU


def warm_spares(
    host: ReplicaHost,
    ranks: Sequence[RankMemory],
    blocks: int | None,
    layout: Layout,
    place: ReplicaPlace,
    *,
    executor: str,
    online: bool,
    reasons: list[str],
    warnings: list[str],
) -> int:
    """Return how many warm spares a replica keeps on a host. By default it is one while serving, if memory allows.

    Args:
        ranks: what the ranks of the replica on this host need.
        blocks: the number of KV blocks of each rank; None: they are not in the memory of the host.
        online: True for servers.
        reasons, warnings: lines for the log; this function appends its own.

    Raises:
        ConfigError: more were asked for than the memory of the host allows.
    """
    asked, hardware = host.options.parallel.warm_spares, host.facts.hardware
    if asked == 0 or not place.local_size:
        return 0
    if why_useless := _why_useless(layout, executor):
        if asked is not None:
            warnings.append(f"--warm-spares {asked} changes nothing: {why_useless}")
        return 0
    if asked is None and (not online or layout.num_ranks == 1):
        return 0
    count, each = asked or 1, SPARE_BYTES[hardware.device]
    replicas = max(place.local_size, place.local_rank + 1)
    left = hardware.host_memory_available
    if hardware.device == "cpu":
        left -= replicas * sum(rank.weights + rank.activations + (blocks or 0) * rank.block for rank in ranks)
    needed = replicas * count * each
    name = "" if host.here and not host.address else f" on {host.facts.name}"
    if needed <= left:
        why = "as --warm-spares asks" if asked is not None else "so that a rank that dies is replaced at once"
        plural = "s" if count > 1 else ""
        reasons.append(f"{count} warm spare{plural}{name}, each with about {format_bytes(each)} of memory: {why}")
        return count
    missing = (
        f"{replicas} x {count} x {format_bytes(each)} are needed, and the ranks leave {format_bytes(max(left, 0))} of "
        "the available memory"
    )
    if asked is not None:
        raise ConfigError(f"--warm-spares {asked}{name}: {missing}; lower it, or lower --kv-cache-memory-bytes")
    reasons.append(f"no warm spare{name}: {missing}")
    return 0


def _why_useless(layout: Layout, executor: str) -> str:
    if executor in ("uni", "threads"):
        return f"ranks of the executor {executor} are no processes of their own, so that none can be replaced"
    if layout.shares_experts:
        return "replicas that share experts start again together when a rank dies"
    return ""
