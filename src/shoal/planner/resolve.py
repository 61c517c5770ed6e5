"""From what the user said and what the machine has to what is done, with the reasons. Nothing is started here."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shoal import env
from shoal.config.engine_options import Cores, EngineOptions
from shoal.devices import cpu, cuda
from shoal.devices.hardware import Hardware
from shoal.errors import ConfigError
from shoal.models.implementation import Cutting, implementation_of, rank_shards, read_model
from shoal.models.manifest import ITEM_BYTES, Cut, Shard
from shoal.models.open_model import OpenedModel, open_model
from shoal.models.spec import ModelSpec
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.planner.all2all import choose_all2all
from shoal.planner.budgets import kv_budgets, num_blocks
from shoal.planner.costs import cost_shares, draft_cost
from shoal.planner.layout import plan_cutting, shares_experts, standing
from shoal.planner.memory import RankMemory, StepSize, rank_memory, require_capacity
from shoal.wire.plan import ReplicaPlace

Backend = Literal["uni", "threads", "mp"]
_DTYPES = {"float": "float32", "half": "float16"}  # other names that vLLM takes


@dataclass(frozen=True, slots=True)
class Decision:
    """Everything an engine needs to know, decided. `reasons` and `warnings` are lines for the log."""

    folder: Path
    spec: ModelSpec
    hardware: Hardware
    dtype: str
    max_model_len: int
    backend: Backend
    cutting: Cutting
    place: ReplicaPlace
    ranks: tuple[RankMemory, ...]  # by rank of the replica
    cost_shares: tuple[float, ...]  # of what a token costs in all of them, an estimate
    kv_budgets: tuple[int | None, ...]  # bytes by rank; None: measured by the rank
    max_in_flight: int
    all2all: str  # how tokens reach other replicas' experts; "": they need not
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    model_impl: str = "shoal"  # or "transformers"
    draft_folder: Path | None = None  # of the model that guesses ahead
    draft: ModelSpec | None = None  # ... and what it is
    file_states: tuple[str, str] = ("", "")  # of the model's files and the draft model's, "" where weights are made up
    # What stands over config.json, and over the draft model's.
    overrides: Mapping[str, Any] = field(default_factory=dict)
    draft_overrides: Mapping[str, Any] = field(default_factory=dict)
    cores: Cores | None = None  # as --cpu-cores says; None: all that this process may use


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


def resolve(
    options: EngineOptions,
    folder: Path,
    hardware: Hardware,
    draft_folder: Path | None = None,
    place: ReplicaPlace = ReplicaPlace(),  # noqa: B008 - it is frozen
    file_states: tuple[str, str] = ("", ""),
) -> Decision:
    """Decides what was left open, and refuses what can't work. `draft_folder`: of the model that guesses ahead.

    `place` is that of one replica. Without it the decision is for all of them, as the first one will take it. One of
    which none is on this host (`local_size` 0) needs nothing of it, and its KV cache is not known. `file_states`: what
    the files of both models must be, where somebody has read them before.

    Raises:
        UserError: the models can't be read, or the options, the models and the hardware don't go together.
    """
    reasons: list[str] = []
    warnings: list[str] = []
    place = standing(options, place)
    if place.memory_available:
        hardware = dataclasses.replace(hardware, host_memory_available=place.memory_available)
    spec, draft_spec = _read(options, folder, draft_folder, reasons)
    cutting = plan_cutting(options, spec, draft_spec, place, reasons, warnings)
    here = place.local_size > 0
    if here:
        reasons += hardware.limits
        hardware = _within(options, place, hardware, reasons)
        _check_devices(options, place, hardware, reasons, warnings)
    else:
        reasons.append("no replica runs on this host: nothing is planned for its memory and devices")
    backend = _backend(options, cutting, hardware, reasons)
    model, draft = _open(options, folder, spec, draft_folder, draft_spec, file_states, reasons)
    spec, draft_spec = model.spec, None if draft is None else draft.spec
    shards = rank_shards(spec, cutting)
    dtype = _dtype(options, spec, reasons)
    reasons += [each.describe(cutting.tp) for each in (spec, draft_spec) if isinstance(each, FallbackSpec)]
    if cutting.tp_split is not None:
        reasons.append(f"shares {':'.join(map(str, cutting.tp_split))} of {spec.family}: {_held(shards[: cutting.tp])}")
    ranks, shares = _measure(options, model, draft, shards, cutting, dtype, hardware.device)
    if options.model_options.enforce_eager:
        reasons.append("--enforce-eager changes nothing: steps are launched operation by operation in any case")
    unknown = (None,) * len(ranks)
    budgets = kv_budgets(options, hardware, ranks, reasons, replicas=place.local_size) if here else unknown
    max_model_len = _max_model_len(options, spec, draft_spec, num_blocks(ranks, budgets), reasons)
    all2all = _all2all(options, spec, cutting, dtype, reasons)
    return Decision(
        folder=folder,
        spec=spec,
        hardware=hardware,
        dtype=dtype,
        max_model_len=max_model_len,
        backend=backend,
        cutting=cutting,
        place=place,
        ranks=ranks,
        cost_shares=shares,
        kv_budgets=budgets,
        max_in_flight=options.scheduler.max_in_flight or len(cutting.stages) + 1,
        all2all=all2all,
        reasons=tuple(reasons),
        warnings=tuple(warnings),
        model_impl=implementation_of(spec),
        draft_folder=draft_folder,
        draft=draft_spec,
        file_states=(model.state, "" if draft is None else draft.state),
        overrides=model.overrides,
        draft_overrides={} if draft is None else draft.overrides,
        cores=options.parallel.cpu_cores if here else None,
    )


def _read(
    options: EngineOptions, folder: Path, draft_folder: Path | None, reasons: list[str]
) -> tuple[ModelSpec, ModelSpec | None]:
    """What config.json says of the model, and of the draft model, where there is one."""
    said = options.model_options
    spec = read_model(folder, said.model_impl, said.hf_overrides or {})
    if said.hf_overrides:
        reasons.append(f"--hf-overrides stand over config.json: {', '.join(said.hf_overrides)}")
    draft = None if draft_folder is None else read_model(draft_folder, "auto")
    if draft is not None and draft.vocab_size != spec.vocab_size:
        raise ConfigError(
            f"the draft model {draft_folder} has a vocabulary of {draft.vocab_size} tokens, the model one of "
            f"{spec.vocab_size}: they must be the same; choose a draft model of the same family"
        )
    return spec, draft


def _open(
    options: EngineOptions,
    folder: Path,
    spec: ModelSpec,
    draft_folder: Path | None,
    draft_spec: ModelSpec | None,
    states: tuple[str, str],
    reasons: list[str],
) -> tuple[OpenedModel, OpenedModel | None]:
    """Both with their weights.

    Raises:
        CheckpointError: the weights are missing or broken, do not go with config.json, or are not in `states`.
    """
    said, weights = options.model_options, options.model_options.load_format != "dummy"
    model = open_model(folder, spec, said.model_impl, said.hf_overrides or {}, weights=weights, state=states[0])
    reasons += model.notes
    if draft_folder is None or draft_spec is None:
        return model, None
    draft = open_model(draft_folder, draft_spec, "auto", {}, weights=weights, state=states[1])
    reasons += [f"draft model: {note}" for note in draft.notes]
    return model, draft


def _step_size(options: EngineOptions) -> StepSize:
    """With guesses, a token is drawn behind each of them."""
    scheduler, speculative = options.scheduler, options.model_options.speculative_config
    behind = 1 if speculative is None else 1 + speculative.num_speculative_tokens
    tokens = scheduler.max_num_batched_tokens
    return StepSize(tokens, min(scheduler.max_num_seqs * behind, tokens))


def _measure(
    options: EngineOptions,
    model: OpenedModel,
    draft: OpenedModel | None,
    shards: Sequence[Shard],
    cutting: Cutting,
    dtype: str,
    device: str,
) -> tuple[tuple[RankMemory, ...], tuple[float, ...]]:
    """What each rank needs, and its share of the cost of a token.

    A draft model runs on the ranks of the last stage, which are those that know what was drawn.
    """
    together = cutting.replicas if shares_experts(cutting) else 1
    ranks = _rank_memories(options, model, shards, dtype, device, _step_size(options), together)
    speculative = options.model_options.speculative_config
    if draft is None or speculative is None:
        return ranks, cost_shares(model.spec, model.params, shards, replicas=together)
    drafting = rank_shards(draft.spec, Cutting(cutting.tp, cutting.tp_split))
    guesses = StepSize(options.scheduler.max_num_batched_tokens, options.scheduler.max_num_seqs)
    drafts = _rank_memories(options, draft, drafting, dtype, device, guesses)
    last = [rank.with_draft(other) for rank, other in zip(ranks[-cutting.tp :], drafts, strict=True)]
    costs = [draft_cost(draft.spec, draft.params, speculative.num_speculative_tokens, shard) for shard in drafting]
    shares = cost_shares(model.spec, model.params, shards, replicas=together, draft=costs)
    return (*ranks[: -cutting.tp], *last), shares


def _rank_memories(
    options: EngineOptions,
    model: OpenedModel,
    shards: Sequence[Shard],
    dtype: str,
    device: str,
    step: StepSize,
    replicas: int = 1,
) -> tuple[RankMemory, ...]:
    return tuple(
        rank_memory(
            model.spec,
            model.params,
            shard,
            dtype=dtype,
            device=device,
            block_size=options.cache.block_size,
            step=step,
            replicas=replicas,
        )
        for shard in shards
    )


def _held(shards: Sequence[Shard]) -> str:
    """What each rank holds, `6, 3, 3 query heads, ...`."""
    counts = {
        "query heads": [len(shard.heads.q_range) for shard in shards],
        "KV heads": [len(shard.heads.kv_ids) for shard in shards],
        "MLP columns": [len(shard.ranges[Cut.MLP]) for shard in shards],
        "tokens of the vocabulary": [len(shard.ranges[Cut.VOCAB]) for shard in shards],
    }
    return "; ".join(f"{', '.join(map(str, each))} {what}" for what, each in counts.items())


def _within(options: EngineOptions, place: ReplicaPlace, hardware: Hardware, reasons: list[str]) -> Hardware:
    """The host with no more cores than --cpu-cores names.

    Raises:
        ConfigError: it names others, or lists for more or fewer ranks.
    """
    lists = options.parallel.cpu_cores
    if not lists:
        return hardware
    named = tuple(sorted(core for each in lists for core in each))
    strange = [core for core in named if core not in hardware.cores]
    if strange:
        raise ConfigError(
            f"--cpu-cores (or VLLM_CPU_OMP_THREADS_BIND) names {', '.join(map(str, strange[:5]))}, which this process "
            f"may not use: it may use {', '.join(map(str, hardware.cores))}"
        )
    ranks = options.parallel.tensor_parallel_size * options.parallel.pipeline_parallel_size * place.local_size
    if len(lists) not in (1, ranks):
        raise ConfigError(
            f"--cpu-cores has {len(lists)} lists, this host {ranks} ranks: give one for each, or one that they share"
        )
    reasons.append(f"cores {'|'.join(','.join(map(str, each)) for each in lists)}: as asked")
    counted = hardware.device == "cpu" and options.parallel.num_devices is None
    return dataclasses.replace(hardware, cores=named, num_devices=len(named) if counted else hardware.num_devices)


def _check_devices(
    options: EngineOptions, place: ReplicaPlace, hardware: Hardware, reasons: list[str], warnings: list[str]
) -> None:
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
            f"rank {index - first} on cuda:{index} (CUDA_VISIBLE_DEVICES entry {hardware.visible[index]})"
            for index in range(first, first + world)
            if hardware.visible
        )
    elif hardware.devices_shareable:
        warnings.append(f"{product} ranks share {count} {kind}: they take turns, and a step waits for the last")
    else:
        asked = " x ".join(f"{flag} {size}" for flag, size in named.items())
        shown = cuda.because_of(env.visible_cuda_devices()) if hardware.device == "cuda" else ""
        less = f"Use {next(iter(named))} {count} or fewer" if len(named) == 1 else f"Lower them to {count} or fewer"
        way_out = "raise --num-devices" if hardware.device == "cpu" else "use --device cpu"
        raise ConfigError(
            f"{asked} needs {product} devices; this host has {count} ({hardware.device}){shown}. {less}, or {way_out}"
        )


def _dtype(options: EngineOptions, spec: ModelSpec, reasons: list[str]) -> str:
    wanted = options.model_options.dtype
    dtype = spec.dtype if wanted == "auto" else _DTYPES.get(wanted, wanted)
    if dtype not in ITEM_BYTES:
        raise ConfigError(f"the checkpoint's dtype {dtype} is not supported; choose --dtype {', '.join(ITEM_BYTES)}")
    reasons.append(f"dtype {dtype}: " + ("the checkpoint's" if wanted == "auto" else "as asked"))
    return dtype


def _backend(options: EngineOptions, cutting: Cutting, hardware: Hardware, reasons: list[str]) -> Backend:
    wanted, ranks = options.parallel.distributed_executor_backend, cutting.tp * len(cutting.stages)
    together = ranks * cutting.replicas if shares_experts(cutting) else ranks  # who exchange tensors
    if wanted == "uni" and max(together, options.parallel.data_parallel_size) > 1:
        count = max(together, ranks * options.parallel.data_parallel_size)
        raise ConfigError(f"--distributed-executor-backend uni runs one rank, not {count}: use mp or threads")
    if wanted == "threads" and together > 1 and hardware.device == "cuda":
        raise ConfigError(f"--distributed-executor-backend threads can't move tensors between {together} GPUs: use mp")
    if wanted != "auto":
        return wanted
    backend: Backend = "uni" if together == 1 else "mp"
    reasons.append(f"executor {backend}: {ranks} rank{'s' if ranks > 1 else ''}")
    return backend


def _max_model_len(
    options: EngineOptions,
    spec: ModelSpec,
    draft: ModelSpec | None,
    blocks: int | None,
    reasons: list[str],
) -> int:
    wanted, size = options.model_options.max_model_len, options.cache.block_size
    _check_positions(wanted, spec)
    longest = wanted or spec.max_positions
    drafts = longest if draft is None else min(draft.max_positions, draft.steady_positions or draft.max_positions)
    if drafts < longest:
        if wanted is not None:
            raise ConfigError(
                f"--max-model-len {wanted} is more than the draft model's {drafts} positions: lower it, or choose "
                "another draft model"
            )
        reasons.append(f"max_model_len {drafts}, not the model's {longest}: the draft model has no more")
        longest = drafts
    if blocks is None:
        return longest
    fits = blocks * size
    if wanted is not None or fits < size:
        require_capacity(blocks, size, longest)
    if fits < longest:
        reasons.append(f"max_model_len {fits}, not the model's {longest}: the KV cache holds no more")
    return min(longest, fits)


def _check_positions(wanted: int | None, spec: ModelSpec) -> None:
    """Raises:
    ConfigError: the model is not made for texts of this length.
    """
    if wanted is not None and wanted > spec.max_positions:
        by = f" ({spec.stretched_by})" if spec.stretched_by else ""
        raise ConfigError(
            f"--max-model-len {wanted} is more than the model's {spec.max_positions} positions{by}: lower it, or "
            "stretch them by a rope_scaling in --hf-overrides, if the model bears it"
        )
    steady = spec.steady_positions
    if steady is not None and (wanted or spec.max_positions) > steady:
        asked = f"--max-model-len {wanted} is" if wanted else f"the model's {spec.max_positions} positions are"
        raise ConfigError(
            f"{asked} more than its original {steady}: in longer texts its rope scaling turns all tokens by other "
            f"angles, which is not supported; use --max-model-len {steady} or less"
        )


def _all2all(options: EngineOptions, spec: ModelSpec, cutting: Cutting, dtype: str, reasons: list[str]) -> str:
    if spec.moe is None or not shares_experts(cutting):
        return ""
    wanted = options.parallel.all2all_backend
    if wanted != "auto":
        return wanted
    found, why = choose_all2all(
        experts=spec.moe.num_experts,
        top_k=spec.moe.routing.top_k,
        hidden_size=spec.hidden_size,
        dtype=dtype,
        ranks=cutting.replicas * cutting.tp,
        tp=cutting.tp,
    )
    reasons.append(f"all2all backend {found}: {why}")
    return found


def rank_cores(decision: Decision) -> tuple[tuple[int, ...], ...]:
    """The cores of each rank. Replicas on one host share its cores."""
    world, place = len(decision.ranks), decision.place
    first = place.local_rank * world
    if decision.cores is not None and len(decision.cores) > 1:
        return decision.cores[first : first + world]
    return tuple(
        cpu.cores_of_rank(decision.hardware.cores, first + rank, place.local_size * world) for rank in range(world)
    )
