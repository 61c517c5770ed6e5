"""From what the user said and what the machine has to what is done, with the reasons. Nothing is started here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal.config import EngineOptions, format_bytes
from shoal.devices import cpu, cuda
from shoal.errors import ConfigError
from shoal.models import manifest
from shoal.models.checkpoint import open_checkpoint
from shoal.models.registry import read_spec, tensor_names
from shoal.models.spec import ModelSpec
from shoal.planner.memory import DTYPE_BYTES, RankMemory, rank_memory, require_capacity
from shoal.types import Hardware

_CPU_KV_CEILING = 4 * 2**30
_CPU_KV_SHARE = 0.4

Backend = Literal["uni", "threads", "mp"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Everything an engine needs to know, decided. `reasons` and `warnings` are lines for the log."""

    folder: Path
    spec: ModelSpec
    hardware: Hardware
    dtype: str
    max_model_len: int
    backend: Backend
    ranks: tuple[RankMemory, ...]
    kv_budgets: tuple[int | None, ...]  # bytes by rank; None: measured by the rank
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


def discover(options: EngineOptions) -> Hardware:
    """The devices to use.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    wanted, count = options.parallel.device, options.parallel.num_devices
    if wanted == "cuda" and not cuda.torch_has_cuda():
        raise ConfigError(
            "--device cuda: the installed PyTorch has no CUDA; install a build that has, or use --device cpu"
        )
    found = cuda.discover(count) if wanted != "cpu" and cuda.torch_has_cuda() else None
    if found is None and wanted == "cuda":
        raise ConfigError("--device cuda: this host shows no CUDA device; use --device cpu")
    return found or cpu.discover(count)


def resolve(options: EngineOptions, folder: Path, hardware: Hardware) -> Decision:
    """Decides what was left open, and refuses what can't work.

    Raises:
        UserError: the model can't be read, or the options, the model and the hardware don't go together.
    """
    spec = read_spec(folder)
    params = manifest.manifest(spec, tensor_names(spec))
    if options.model_options.load_format != "dummy":
        checkpoint = open_checkpoint(folder)
        manifest.check(params, checkpoint.shapes, str(folder))
        checkpoint.check_types(piece.source for param in params for piece in param.pieces)

    reasons: list[str] = []
    warnings: list[str] = []
    tp = options.parallel.tensor_parallel_size
    _check_devices(tp, hardware, reasons, warnings)
    dtype = _dtype(options, spec, reasons)
    if options.model_options.enforce_eager:
        reasons.append("--enforce-eager changes nothing: steps are launched operation by operation in any case")
    backend = _backend(options, tp, hardware, reasons)
    scheduler, cache = options.scheduler, options.cache
    ranks = tuple(
        rank_memory(
            spec,
            params,
            shard,
            dtype=dtype,
            device=hardware.device,
            block_size=cache.block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
        )
        for shard in manifest.shards(spec, tp)
    )
    budgets = _kv_budgets(options, hardware, ranks, reasons)
    max_model_len = _max_model_len(options, spec, ranks, budgets, reasons)
    return Decision(
        folder=folder,
        spec=spec,
        hardware=hardware,
        dtype=dtype,
        max_model_len=max_model_len,
        backend=backend,
        ranks=ranks,
        kv_budgets=budgets,
        reasons=tuple(reasons),
        warnings=tuple(warnings),
    )


def _check_devices(tp: int, hardware: Hardware, reasons: list[str], warnings: list[str]) -> None:
    count = hardware.num_devices
    kind = {"cpu": "CPU cores", "cuda": "GPUs"}[hardware.device]
    if tp <= count:
        reasons.append(f"{tp} rank{'s' if tp > 1 else ''} on {count} {kind}")
    elif hardware.devices_shareable:
        warnings.append(f"{tp} ranks share {count} {kind}: they take turns, and a step waits for the last")
    else:
        way_out = "raise --num-devices" if hardware.device == "cpu" else "use --device cpu"
        raise ConfigError(
            f"--tensor-parallel-size {tp} needs {tp} devices; this host has {count} ({hardware.device}). "
            f"Use --tensor-parallel-size {count} or fewer, or {way_out}"
        )


def _dtype(options: EngineOptions, spec: ModelSpec, reasons: list[str]) -> str:
    wanted = options.model_options.dtype
    dtype = spec.dtype if wanted == "auto" else wanted
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"the checkpoint's dtype {dtype} is not supported; choose --dtype {', '.join(DTYPE_BYTES)}")
    reasons.append(f"dtype {dtype}: " + ("the checkpoint's" if wanted == "auto" else "as asked"))
    return dtype


def _backend(options: EngineOptions, tp: int, hardware: Hardware, reasons: list[str]) -> Backend:
    wanted = options.parallel.distributed_executor_backend
    if wanted == "uni" and tp > 1:
        raise ConfigError(f"--distributed-executor-backend uni runs one rank, not {tp}: use mp or threads")
    if wanted == "threads" and tp > 1 and hardware.device == "cuda":
        raise ConfigError(f"--distributed-executor-backend threads can't move tensors between {tp} GPUs: use mp")
    if wanted != "auto":
        return wanted
    backend: Backend = "uni" if tp == 1 else "mp"
    reasons.append(f"executor {backend}: {tp} rank{'s' if tp > 1 else ''}")
    return backend


def _kv_budgets(
    options: EngineOptions, hardware: Hardware, ranks: Sequence[RankMemory], reasons: list[str]
) -> tuple[int | None, ...]:
    cache = options.cache
    budgets: tuple[int | None, ...]
    if cache.kv_cache_memory_bytes is not None:
        reasons.append(f"KV cache of {format_bytes(cache.kv_cache_memory_bytes)} a rank: as asked")
        budgets, way_out = (cache.kv_cache_memory_bytes,) * len(ranks), "lower --kv-cache-memory-bytes"
    elif cache.device_memory is not None:
        budgets = tuple(_left_of(options, number, rank, reasons) for number, rank in enumerate(ranks))
        way_out = "lower --device-memory"
    elif hardware.device == "cuda":
        for number, rank in enumerate(ranks):
            _check_cuda_memory(options, hardware, number, rank)
        reasons.append("KV cache: what each GPU has left after weights and the largest step, which is measured")
        return (None,) * len(ranks)
    else:
        budgets = (_default_cpu_budget(hardware, ranks, reasons),) * len(ranks)
        way_out = "set --kv-cache-memory-bytes to less"
    if hardware.device == "cpu":
        needs = [rank.weights + rank.activations + (kv or 0) for rank, kv in zip(ranks, budgets, strict=True)]
        if cache.kv_cache_memory_bytes is None and cache.device_memory is not None:
            needs = [cache.device_memory] * len(ranks)
        _check_host_memory(hardware, needs, sum(rank.weights for rank in ranks), way_out)
    return budgets


def _default_cpu_budget(hardware: Hardware, ranks: Sequence[RankMemory], reasons: list[str]) -> int:
    share = int(min(_CPU_KV_CEILING, _CPU_KV_SHARE * hardware.host_memory_available) / len(ranks))
    free = format_bytes(hardware.host_memory_available)
    reasons.append(
        f"KV cache of {format_bytes(share)} a rank: the smaller of {format_bytes(_CPU_KV_CEILING)} and "
        f"{_CPU_KV_SHARE:.0%} of the {free} available, over {len(ranks)} rank{'s' if len(ranks) > 1 else ''}"
    )
    return share


def _left_of(options: EngineOptions, number: int, rank: RankMemory, reasons: list[str]) -> int:
    budget = options.cache.device_memory or 0
    left = rank.kv_budget(budget, options.cache.block_size, options.model_options.max_model_len)
    weights, activations = format_bytes(rank.weights), format_bytes(rank.activations)
    if left <= 0:
        missing = format_bytes(rank.weights + rank.activations - budget)
        raise ConfigError(
            f"--device-memory {format_bytes(budget)} is {missing} too small for rank {number}: weights take {weights}, "
            f"activations {activations}. Raise it, raise --tensor-parallel-size, or lower --max-num-batched-tokens"
        )
    reasons.append(
        f"rank {number}: {format_bytes(left)} for the KV cache, what {weights} of weights, {activations} of "
        f"activations and {rank.context_token} bytes a context token leave of {format_bytes(budget)}"
    )
    return left


def _check_cuda_memory(options: EngineOptions, hardware: Hardware, number: int, rank: RankMemory) -> None:
    """Refuses what can't fit at all; a rank measures the rest when it has loaded."""
    if hardware.device_memory is None:
        return
    share = options.cache.gpu_memory_utilization
    missing = rank.weights - int(hardware.device_memory * share)
    if missing >= 0:
        raise ConfigError(
            f"rank {number} needs {format_bytes(rank.weights)} for weights, {format_bytes(missing)} more than "
            f"--gpu-memory-utilization {share} allows of {format_bytes(hardware.device_memory)}: "
            "raise --tensor-parallel-size"
        )


def _check_host_memory(hardware: Hardware, needs: Sequence[int], weights: int, way_out: str) -> None:
    """`needs` are bytes by rank, of which `weights` in all for weights."""
    missing = sum(needs) - hardware.host_memory_available
    if missing > 0:
        raise ConfigError(
            f"{len(needs)} rank{'s' if len(needs) > 1 else ''} need {format_bytes(sum(needs))} (weights "
            f"{format_bytes(weights)}), {format_bytes(missing)} more than this host has available: {way_out}, choose "
            "--dtype bfloat16, or use a larger host"
        )


def _max_model_len(
    options: EngineOptions,
    spec: ModelSpec,
    ranks: Sequence[RankMemory],
    budgets: Sequence[int | None],
    reasons: list[str],
) -> int:
    wanted, size = options.model_options.max_model_len, options.cache.block_size
    if wanted is not None and wanted > spec.max_positions:
        raise ConfigError(f"--max-model-len {wanted} is more than the model's {spec.max_positions} positions: lower it")
    longest = wanted or spec.max_positions
    blocks = [b // rank.block for rank, b in zip(ranks, budgets, strict=True) if b is not None and rank.block]
    if not blocks:
        return longest
    fits = min(blocks) * size
    if wanted is not None or fits < size:
        require_capacity(min(blocks), size, longest)
    if fits < longest:
        reasons.append(f"max_model_len {fits}, not the model's {longest}: the KV cache holds no more")
    return min(longest, fits)


def rank_cores(decision: Decision) -> tuple[tuple[int, ...], ...]:
    """The cores of each rank."""
    count = len(decision.ranks)
    return tuple(cpu.cores_of_rank(decision.hardware.cores, rank, count) for rank in range(count))
