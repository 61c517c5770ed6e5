"""The layout of a model over ranks: parts of layers, pipeline stages, experts.

It is decided from config.json alone, before the checkpoint is opened.
"""

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.models.implementation import params_of
from shoal.models.spec import ModelSpec
from shoal.parallel.stages import balance_stages
from shoal.planner.costs import draft_cost, token_cost
from shoal.wire.plan import Layout, ReplicaPlace


def plan_layout(
    options: EngineOptions,
    spec: ModelSpec,
    draft: ModelSpec | None,
    place: ReplicaPlace,
    reasons: list[str],
    warnings: list[str],
) -> Layout:
    """Return the layout that the options ask for.

    Args:
        draft: the draft model, which runs on the last stage.
        reasons, warnings: lines for the log; this function appends its own.

    Raises:
        ConfigError: the model cannot be cut like this; the message says why, and what to do.
    """
    parallel = options.parallel
    _check_split(options)
    layers = _stages(options, spec, draft, reasons)
    if parallel.enable_expert_parallel and spec.moe is None:
        raise ConfigError(
            f"--enable-expert-parallel: a {spec.family} model has no experts to place; leave it out, and use "
            "--tensor-parallel-size, --pipeline-parallel-size or --data-parallel-size"
        )
    layout = Layout(
        tp=parallel.tensor_parallel_size,
        tp_split=parallel.tensor_parallel_split or (),
        stages=layers,
        experts=parallel.expert_placement_strategy if parallel.enable_expert_parallel else "",
        replica=place.rank,
        replicas=place.size,
    )
    _warn_of_flags_without_effect(options, layout, warnings)
    _warn_of_idle_stages(options, len(layers), warnings)
    return layout


def _check_split(options: EngineOptions) -> None:
    split, tp = options.parallel.tensor_parallel_split, options.parallel.tensor_parallel_size
    if split is not None and len(split) != tp:
        shares = f"{len(split)} share{'s' if len(split) > 1 else ''}"
        raise ConfigError(
            f"--tensor-parallel-split {_listed(split)} has {shares}, but --tensor-parallel-size is {tp}: give one "
            f"share for each rank, or use --tensor-parallel-size {len(split)}"
        )


def _stages(options: EngineOptions, spec: ModelSpec, draft: ModelSpec | None, reasons: list[str]) -> tuple[int, ...]:
    """Return how many layers each pipeline stage has."""
    count, given = options.parallel.pipeline_parallel_size, options.parallel.pipeline_layer_partition
    if given is not None:
        _check_partition(given, count, spec)
    if count > spec.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {count} is more than the model's {spec.num_layers} layers, but each stage needs "
            f"at least one: use --pipeline-parallel-size {spec.num_layers} or less"
        )
    if count == 1:
        return (spec.num_layers,)
    cost = token_cost(spec, params_of(spec))
    speculative, last_extra = options.model_options.speculative_config, cost.last_extra
    why = "so that they cost about the same"
    if draft is not None and speculative is not None:
        last_extra += draft_cost(draft, params_of(draft), speculative.num_speculative_tokens)
        why += ", with the draft model on the last one"
    layers = given or balance_stages(cost.layers, count, first_extra=cost.first_extra, last_extra=last_extra)
    why = "as --pipeline-layer-partition asks" if given else why
    reasons.append(f"{count} stages of {_listed(layers)} layers: {why}")
    return layers


def _check_partition(given: tuple[int, ...], count: int, spec: ModelSpec) -> None:
    if len(given) != count:
        stages = f"{len(given)} stage{'s' if len(given) > 1 else ''}"
        raise ConfigError(
            f"--pipeline-layer-partition {_listed(given)} has {stages}, but --pipeline-parallel-size is {count}: give "
            f"one number for each stage, or use --pipeline-parallel-size {len(given)}"
        )
    if sum(given) != spec.num_layers:
        raise ConfigError(
            f"--pipeline-layer-partition {_listed(given)} has {sum(given)} layers, but the model has "
            f"{spec.num_layers}: the numbers must sum to {spec.num_layers}"
        )


def _warn_of_flags_without_effect(options: EngineOptions, layout: Layout, warnings: list[str]) -> None:
    parallel = options.parallel
    if parallel.expert_placement_strategy != "linear" and not layout.experts:
        warnings.append(
            f"--expert-placement-strategy {parallel.expert_placement_strategy} changes nothing without "
            "--enable-expert-parallel: every rank holds a part of every expert"
        )
    if parallel.all2all_backend != "auto" and not layout.shares_experts:
        why = "with one replica" if layout.experts else "without --enable-expert-parallel"
        warnings.append(
            f"--all2all-backend {parallel.all2all_backend} changes nothing {why}: no tokens are sent to other replicas"
        )


def _warn_of_idle_stages(options: EngineOptions, stages: int, warnings: list[str]) -> None:
    given = options.scheduler.max_in_flight
    if given is not None and given < stages:
        warnings.append(
            f"--max-in-flight {given} lets only {given} of {stages} pipeline stages compute at a time, the others "
            f"wait: use --max-in-flight {stages + 1}, or leave it out"
        )


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
