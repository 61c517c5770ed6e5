"""The size of each rank's KV cache, and the check that everything fits into memory."""

from collections.abc import Mapping, Sequence

from shoal.config.engine_options import EngineOptions
from shoal.devices.hardware import Hardware
from shoal.errors import ConfigError
from shoal.planner.memory import RankMemory
from shoal.values import format_bytes
from shoal.wire.hosts import HostFacts

_CPU_KV_CEILING = 4 * 2**30  # the most that the KV caches of a CPU host get together by default, in bytes
_CPU_KV_SHARE = 0.4  # ... and the most as a share of the available memory
_MORE_RANKS = "raise --tensor-parallel-size or --pipeline-parallel-size"


def kv_budgets(
    options: EngineOptions,
    host: HostFacts,
    needs: Mapping[int, RankMemory],
    reasons: list[str],
    *,
    replicas: int = 1,
) -> tuple[int | None, ...]:
    """Return the size of the KV cache of each rank of a host in bytes; None for ranks that measure it.

    All ranks hold the same number of blocks, but a block takes more bytes on some ranks than on others. So the memory
    of the host is divided in proportion to the size of a block. Where the user sets one size for all ranks, the rank
    with the largest blocks decides how many there are.

    Args:
        needs: the needs of a replica's ranks on this host, by the number of the rank.
        reasons: lines for the log; this function appends its own.
        replicas: how many replicas like this one share the host.

    Raises:
        ConfigError: it does not fit; the message says how much is missing, and which flags help.
    """
    cache, hardware, ranks = options.cache, host.hardware, list(needs.values())
    budgets: tuple[int, ...]
    if cache.kv_cache_memory_bytes is not None:
        reasons.append(
            f"KV cache of {format_bytes(cache.kv_cache_memory_bytes)} per rank: as --kv-cache-memory-bytes asks"
        )
        budgets, way_out = (cache.kv_cache_memory_bytes,) * len(ranks), "lower --kv-cache-memory-bytes"
    elif cache.device_memory is not None:
        budgets = tuple(_rest_of_device_memory(options, number, rank, reasons) for number, rank in needs.items())
        way_out = "lower --device-memory"
    elif hardware.device == "cuda":
        for number, rank in needs.items():
            _check_cuda_memory(options, hardware, number, rank)
        reasons.append("KV cache: what each GPU has left after weights and the largest step, which is measured")
        return (None,) * len(ranks)
    elif host.cpu_kv_bytes is not None:
        asked = host.cpu_kv_bytes
        reasons.append(f"KV cache of {format_bytes(asked)} per rank: as VLLM_CPU_KVCACHE_SPACE asks")
        budgets, way_out = (asked,) * len(ranks), "lower VLLM_CPU_KVCACHE_SPACE"
    else:
        budgets = _shares_of_host(hardware, ranks, reasons, replicas)
        way_out = "set --kv-cache-memory-bytes to less"
    if hardware.device == "cpu":
        blocks = num_blocks(ranks, budgets) or 0
        totals = [rank.weights + rank.activations + blocks * rank.block for rank in ranks]
        if cache.kv_cache_memory_bytes is None and cache.device_memory is not None:
            totals = [cache.device_memory] * len(ranks)
        _check_host_memory(hardware, totals * replicas, replicas * sum(rank.weights for rank in ranks), way_out)
    return budgets


def budgets_of_added_replica(
    options: EngineOptions, host: HostFacts, ranks: Sequence[RankMemory], *, planned: int, replicas: int
) -> tuple[int | None, ...] | None:
    """Return the sizes of the KV caches of a replica that is added on a CPU host: the same as those of the others.

    A new share of the host's memory would be smaller than theirs, and too small for some requests that they hold.

    Args:
        planned: how many replicas the host was planned for.
        replicas: how many replicas the host has with the added one.

    Returns:
        None if the user has set a size, or if the host does not have enough memory for all `replicas`.
    """
    asked = options.cache.kv_cache_memory_bytes is not None or options.cache.device_memory is not None
    if host.hardware.device != "cpu" or asked:
        return None
    budgets = kv_budgets(options, host, dict(enumerate(ranks)), [], replicas=planned)
    needs = sum(rank.weights + rank.activations for rank in ranks) + sum(budget or 0 for budget in budgets)
    return budgets if replicas * needs <= host.hardware.host_memory_available else None


def num_blocks(ranks: Sequence[RankMemory], budgets: Sequence[int | None]) -> int | None:
    """Return the number of KV blocks that fit on every rank; None if ranks must measure it.

    Ranks without KV heads have room for any number.
    """
    counts = [b // rank.block for rank, b in zip(ranks, budgets, strict=True) if b is not None and rank.block]
    return min(counts, default=None)


def _shares_of_host(
    hardware: Hardware, ranks: Sequence[RankMemory], reasons: list[str], replicas: int
) -> tuple[int, ...]:
    total = int(min(_CPU_KV_CEILING, _CPU_KV_SHARE * hardware.host_memory_available))
    row = replicas * sum(rank.block for rank in ranks)  # bytes of one block on every rank of every replica
    shares = tuple(total * rank.block // row for rank in ranks)
    even = len(set(shares)) == 1
    sizes = f"{format_bytes(shares[0])} per rank" if even else ", ".join(map(format_bytes, shares)) + " by rank"
    count = replicas * len(ranks)
    over = f", over {count} ranks" + ("" if even else " by what a block takes on each") if count > 1 else ""
    reasons.append(
        f"KV cache of {sizes}: the smaller of {format_bytes(_CPU_KV_CEILING)} and {_CPU_KV_SHARE:.0%} of the "
        f"{format_bytes(hardware.host_memory_available)} available{over}"
    )
    return shares


def _rest_of_device_memory(options: EngineOptions, number: int, rank: RankMemory, reasons: list[str]) -> int:
    """Return what rank `number` has left of --device-memory for its KV cache, in bytes.

    Raises:
        ConfigError: nothing is left.
    """
    budget = options.cache.device_memory or 0
    left = rank.kv_budget(budget, options.cache.block_size, options.model_options.max_model_len)
    weights, activations = format_bytes(rank.weights), format_bytes(rank.activations)
    if left <= 0:
        missing = format_bytes(rank.weights + rank.activations - budget)
        raise ConfigError(
            f"--device-memory {format_bytes(budget)} is {missing} too small for rank {number}: weights take {weights}, "
            f"activations {activations}. Raise it, {_MORE_RANKS}, or lower --max-num-batched-tokens"
        )
    reasons.append(
        f"rank {number}: {format_bytes(left)} for the KV cache, which is {format_bytes(budget)} less {weights} of "
        f"weights, {activations} of activations and {rank.context_token} bytes per token of context"
    )
    return left


def _check_cuda_memory(options: EngineOptions, hardware: Hardware, number: int, rank: RankMemory) -> None:
    """Check that the weights of rank `number` fit on its GPU. The rank measures everything else when it has loaded.

    Raises:
        ConfigError: they do not fit.
    """
    if hardware.device_memory is None:
        return
    share = options.cache.gpu_memory_utilization
    missing = rank.weights - int(hardware.device_memory * share)
    if missing >= 0:
        raise ConfigError(
            f"rank {number} needs {format_bytes(rank.weights)} for weights, {format_bytes(missing)} more than "
            f"--gpu-memory-utilization {share} allows of {format_bytes(hardware.device_memory)}: "
            f"{_MORE_RANKS}"
        )


def _check_host_memory(hardware: Hardware, needs: Sequence[int], weights: int, way_out: str) -> None:
    """Check that the host has as much memory as its ranks need.

    Args:
        needs: bytes that each rank needs.
        weights: how many bytes of all needs together are weights.
        way_out: the first advice of the error message.

    Raises:
        ConfigError: it has less.
    """
    missing = sum(needs) - hardware.host_memory_available
    if missing > 0:
        raise ConfigError(
            f"{len(needs)} rank{'s need' if len(needs) > 1 else ' needs'} {format_bytes(sum(needs))} (weights "
            f"{format_bytes(weights)}), {format_bytes(missing)} more than this host has available: {way_out}, choose "
            "--dtype bfloat16, or use a larger host"
        )
