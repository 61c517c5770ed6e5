"""From what the user said and what the machine has to what is done, with the reasons. Nothing is started here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal import env
from shoal.config import EngineOptions
from shoal.devices import cpu, cuda
from shoal.errors import ConfigError
from shoal.models import manifest
from shoal.models.checkpoint import TensorEntry, open_checkpoint
from shoal.models.fallback import FallbackSpec
from shoal.models.implementation import implementation_of, params_of, read_model, shards_of
from shoal.models.manifest import ITEM_BYTES, Cut, Param, Shard
from shoal.models.spec import ModelSpec
from shoal.planner.budgets import kv_budgets, num_blocks
from shoal.planner.memory import RankMemory, StepSize, rank_memory, require_capacity
from shoal.types import Hardware

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
    model_impl: str = "shoal"  # or "transformers"
    tp_split: tuple[int, ...] = ()  # relative shares of the ranks; empty: equal ones
    draft_folder: Path | None = None  # of the model that guesses ahead
    draft: ModelSpec | None = None  # ... and what it is


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
        hidden = cuda.because_of(env.visible_cuda_devices())
        raise ConfigError(f"--device cuda: this host shows no CUDA device{hidden}; use --device cpu")
    return found or cpu.discover(count)


def resolve(options: EngineOptions, folder: Path, hardware: Hardware, draft_folder: Path | None = None) -> Decision:
    """Decides what was left open, and refuses what can't work. `draft_folder`: of the model that guesses ahead.

    Raises:
        UserError: the models can't be read, or the options, the models and the hardware don't go together.
    """
    weights = options.model_options.load_format != "dummy"
    model = _read(folder, options.model_options.model_impl, weights=weights)
    draft = None if draft_folder is None else _read(draft_folder, "auto", weights=weights)
    spec = model.spec
    _check_split(options)
    if draft is not None:
        _check_vocabularies(spec, draft.spec, draft_folder)

    reasons: list[str] = []
    warnings: list[str] = []
    tp = options.parallel.tensor_parallel_size
    reasons += [each.spec.describe(tp) for each in (model, draft) if each and isinstance(each.spec, FallbackSpec)]
    _check_devices(tp, hardware, reasons, warnings)
    dtype = _dtype(options, spec, reasons)
    if options.model_options.enforce_eager:
        reasons.append("--enforce-eager changes nothing: steps are launched operation by operation in any case")
    backend = _backend(options, tp, hardware, reasons)
    ranks = _rank_memories(options, model, dtype, hardware.device, _step_size(options), reasons)
    if draft is not None:
        guesses = StepSize(options.scheduler.max_num_batched_tokens, options.scheduler.max_num_seqs)
        drafts = _rank_memories(options, draft, dtype, hardware.device, guesses, reasons)
        ranks = tuple(rank.with_draft(other) for rank, other in zip(ranks, drafts, strict=True))
    budgets = kv_budgets(options, hardware, ranks, reasons)
    draft_spec = None if draft is None else draft.spec
    max_model_len = _max_model_len(options, spec, draft_spec, num_blocks(ranks, budgets), reasons)
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
        model_impl=implementation_of(spec),
        tp_split=options.parallel.tensor_parallel_split or (),
        draft_folder=draft_folder,
        draft=draft_spec,
    )


@dataclass(frozen=True, slots=True)
class _Model:
    spec: ModelSpec
    params: tuple[Param, ...]
    stored: Mapping[str, TensorEntry]  # empty where weights are made up


def _read(folder: Path, implementation: str, *, weights: bool) -> _Model:
    """Raises:
    CheckpointError: config.json or the weights are missing or broken, or do not go together.
    """
    spec = read_model(folder, implementation)
    if not weights:
        return _Model(spec, params_of(spec), {})
    checkpoint = open_checkpoint(folder)
    params = params_of(spec, checkpoint.shapes)
    manifest.check(params, checkpoint.shapes, str(folder))
    checkpoint.check_loadable(piece.source for param in params for piece in param.pieces)
    return _Model(spec, params, checkpoint.tensors)


def _check_split(options: EngineOptions) -> None:
    split, tp = options.parallel.tensor_parallel_split, options.parallel.tensor_parallel_size
    if split is not None and len(split) != tp:
        shares = f"{len(split)} share{'s' if len(split) > 1 else ''}"
        raise ConfigError(
            f"--tensor-parallel-split {','.join(map(str, split))} has {shares}, --tensor-parallel-size is {tp}: give "
            f"one share a rank, or --tensor-parallel-size {len(split)}"
        )


def _check_vocabularies(spec: ModelSpec, draft: ModelSpec, folder: Path | None) -> None:
    if draft.vocab_size != spec.vocab_size:
        raise ConfigError(
            f"the draft model {folder} has a vocabulary of {draft.vocab_size} tokens, the model one of "
            f"{spec.vocab_size}: they must be the same; choose a draft model of the same family"
        )


def _step_size(options: EngineOptions) -> StepSize:
    """With guesses, a token is drawn behind each of them."""
    scheduler, speculative = options.scheduler, options.model_options.speculative_config
    behind = 1 if speculative is None else 1 + speculative.num_speculative_tokens
    tokens = scheduler.max_num_batched_tokens
    return StepSize(tokens, min(scheduler.max_num_seqs * behind, tokens))


def _rank_memories(
    options: EngineOptions, model: _Model, dtype: str, device: str, step: StepSize, reasons: list[str]
) -> tuple[RankMemory, ...]:
    split = options.parallel.tensor_parallel_split
    shards = shards_of(model.spec, options.parallel.tensor_parallel_size, split)
    if split is not None:
        reasons.append(f"shares {':'.join(map(str, split))} of {model.spec.family}: {_shares(shards)}")
    return tuple(
        rank_memory(
            model.spec,
            model.params,
            model.stored,
            shard,
            dtype=dtype,
            device=device,
            block_size=options.cache.block_size,
            step=step,
        )
        for shard in shards
    )


def _shares(shards: Sequence[Shard]) -> str:
    """What each rank holds, `6, 3, 3 query heads, ...`."""
    counts = {
        "query heads": [len(shard.heads.q_range) for shard in shards],
        "KV heads": [len(shard.heads.kv_ids) for shard in shards],
        "MLP columns": [len(shard.ranges[Cut.MLP]) for shard in shards],
        "tokens of the vocabulary": [len(shard.ranges[Cut.VOCAB]) for shard in shards],
    }
    return "; ".join(f"{', '.join(map(str, each))} {what}" for what, each in counts.items())


def _check_devices(tp: int, hardware: Hardware, reasons: list[str], warnings: list[str]) -> None:
    count = hardware.num_devices
    kind = {"cpu": "CPU cores", "cuda": "GPUs"}[hardware.device]
    if tp <= count:
        reasons.append(f"{tp} rank{'s' if tp > 1 else ''} on {count} {kind}")
        reasons.extend(
            f"rank {rank} on cuda:{rank} (CUDA_VISIBLE_DEVICES entry {name})"
            for rank, name in enumerate(hardware.visible[:tp])
        )
    elif hardware.devices_shareable:
        warnings.append(f"{tp} ranks share {count} {kind}: they take turns, and a step waits for the last")
    else:
        shown = cuda.because_of(env.visible_cuda_devices()) if hardware.device == "cuda" else ""
        way_out = "raise --num-devices" if hardware.device == "cpu" else "use --device cpu"
        raise ConfigError(
            f"--tensor-parallel-size {tp} needs {tp} devices; this host has {count} ({hardware.device}){shown}. "
            f"Use --tensor-parallel-size {count} or fewer, or {way_out}"
        )


def _dtype(options: EngineOptions, spec: ModelSpec, reasons: list[str]) -> str:
    wanted = options.model_options.dtype
    dtype = spec.dtype if wanted == "auto" else wanted
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"the checkpoint's dtype {dtype} is not supported; choose --dtype {', '.join(ITEM_BYTES)}")
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


def _max_model_len(
    options: EngineOptions,
    spec: ModelSpec,
    draft: ModelSpec | None,
    blocks: int | None,
    reasons: list[str],
) -> int:
    wanted, size = options.model_options.max_model_len, options.cache.block_size
    if wanted is not None and wanted > spec.max_positions:
        raise ConfigError(f"--max-model-len {wanted} is more than the model's {spec.max_positions} positions: lower it")
    longest = wanted or spec.max_positions
    if draft is not None and draft.max_positions < longest:
        if wanted is not None:
            raise ConfigError(
                f"--max-model-len {wanted} is more than the draft model's {draft.max_positions} positions: lower it, "
                "or choose another draft model"
            )
        reasons.append(f"max_model_len {draft.max_positions}, not the model's {longest}: the draft model has no more")
        longest = draft.max_positions
    if blocks is None:
        return longest
    fits = blocks * size
    if wanted is not None or fits < size:
        require_capacity(blocks, size, longest)
    if fits < longest:
        reasons.append(f"max_model_len {fits}, not the model's {longest}: the KV cache holds no more")
    return min(longest, fits)


def rank_cores(decision: Decision) -> tuple[tuple[int, ...], ...]:
    """The cores of each rank."""
    count = len(decision.ranks)
    return tuple(cpu.cores_of_rank(decision.hardware.cores, rank, count) for rank in range(count))
