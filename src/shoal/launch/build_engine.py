"""Where the parts come together: from options to a running engine."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from shoal import env
from shoal.config.engine_options import EngineOptions
from shoal.devices import cpu
from shoal.engine.core import EngineCore
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.speculation import make_drafters
from shoal.errors import ConfigError
from shoal.executors.base import Links, RankExecutor
from shoal.lazy import load
from shoal.log import get_logger
from shoal.planner.memory import require_capacity
from shoal.planner.resolve import Decision, rank_cores
from shoal.process.forks import Owner
from shoal.protocols import Lockstep
from shoal.text.generation_config import GenerationDefaults
from shoal.text.grammar_host import grammar_pool
from shoal.wire.base import WIRE_VERSION
from shoal.wire.ranks import RankSetup

log = get_logger("engine")

# Logits of prompt tokens in a step, where all are looked at: others wait for them, a tenth of a second or so.
_PROMPT_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 30}
_COMM_GRACE_S = 10.0  # a rank waits longer for others than the executor for a step: the one who knows more speaks


def build_engine(
    options: EngineOptions,
    decision: Decision,
    *,
    own_process: bool = False,
    lockstep: Lockstep | None = None,
    groups: Any = None,
) -> EngineCore:
    """Starts ranks and engine. `own_process`: this process is ours, and may be bound to cores. `lockstep`: with the
    replicas whose experts these ranks use. `groups`: where ranks meet that are threads, of other replicas too.

    Raises:
        UserError, EngineError: as the executor says.
    """
    begun = time.monotonic()
    if decision.backend in _IN_PROCESS:
        _check_threads_of_torch()
    for reason in decision.reasons:
        log.info("%s", reason)
    for warning in decision.warnings:
        log.warning("%s", warning)
    setups = rank_setups(options, decision)
    may_bind = own_process and "torch" not in sys.modules and bool(setups[0].cores)
    if decision.backend == "uni" and decision.hardware.device == "cpu" and may_bind:
        env.prefer(cpu.pinning(setups[0].cores))
    size = options.cache.block_size
    asked = options.model_options.max_model_len
    links = _LINKS[decision.backend](setups, groups)
    launched = time.monotonic() - begun
    executor = RankExecutor(
        links,
        setups,
        check_capacity=lambda blocks: require_capacity(blocks, size, asked or size),
        start_timeout=options.parallel.start_timeout,
        step_timeout=options.parallel.step_timeout,
    )
    executor.start_times = {"launch": launched, **executor.start_times}
    limits = SchedulerLimits(
        max_num_seqs=options.scheduler.max_num_seqs,
        max_num_batched_tokens=options.scheduler.max_num_batched_tokens,
        max_model_len=min(decision.max_model_len, executor.num_blocks * size),
        window=_window(decision),
        stages=len(setups[0].stages),
        prompt_logprobs=max(_PROMPT_LOGITS[decision.hardware.device] // decision.spec.vocab_size, 1),
    )
    _log_ready(executor, size, limits.max_model_len, time.monotonic() - begun)
    eos = GenerationDefaults.open(decision.folder, sampling=False, overrides=decision.overrides).eos
    return EngineCore(
        executor,
        limits,
        block_size=size,
        prefix_caching=options.cache.enable_prefix_caching,
        max_in_flight=decision.max_in_flight,
        incarnation=setups[0].incarnation,
        grammars=grammar_pool(decision.folder, eos, decision.spec.vocab_size, decision.hardware.cores),
        make_drafter=make_drafters(options.model_options.speculative_config),
        lockstep=lockstep,
        memory_timeout=options.parallel.start_timeout,
    )


_IN_PROCESS = ("uni", "threads")
_first_in_process: list[Owner] = []  # the process in which ranks ran first


def _check_threads_of_torch() -> None:
    """
    Raises:
        ConfigError: ranks have run in the process from which this one was forked.
    """
    if not _first_in_process:
        _first_in_process.append(Owner("rank"))
    if not _first_in_process[0].is_here:
        raise ConfigError(
            "a rank can't run in this process: it was forked from one in which ranks have run, and PyTorch's threads "
            "have not come along: start it with spawn instead of fork, or use --distributed-executor-backend mp"
        )


def _window(decision: Decision) -> int | None:
    """How far any layer looks back, the draft model's included; None where one sees everything."""
    specs = [decision.spec] if decision.draft is None else [decision.spec, decision.draft]
    windows = [attention.window for spec in specs for attention in spec.attention]
    return None if None in windows else max(window for window in windows if window is not None)


def _log_ready(executor: RankExecutor, block_size: int, max_model_len: int, seconds: float) -> None:
    tokens = executor.num_blocks * block_size
    log.info(
        "KV cache: %d blocks x %d = %d tokens, %.1f requests of %d",
        *(executor.num_blocks, block_size, tokens, tokens / max_model_len, max_model_len),
    )
    phases = ", ".join(f"{name} {took:.2f}" for name, took in executor.start_times.items())
    log.info("engine ready in %.2f s (%s)", seconds, phases)


def rank_setups(options: EngineOptions, decision: Decision) -> list[RankSetup]:
    """What each rank of the replica is told."""
    size, cutting, place = len(decision.ranks), decision.cutting, decision.place
    speculative = options.model_options.speculative_config
    incarnation = time.time_ns() & 0x7FFFFFFFFFFFFFFF
    return [
        RankSetup(
            wire_version=WIRE_VERSION,
            rank=rank,
            world_size=size,
            incarnation=incarnation,
            model_path=str(decision.folder),
            model_impl=decision.model_impl,
            tp=cutting.tp,
            tp_split=cutting.tp_split or (),
            stages=cutting.stages,
            load_format=options.model_options.load_format,
            dtype=decision.dtype,
            device=decision.hardware.device,
            device_index=place.local_rank * size + rank,
            seed=options.model_options.seed,
            block_size=options.cache.block_size,
            max_model_len=decision.max_model_len,
            max_num_seqs=options.scheduler.max_num_seqs,
            max_num_batched_tokens=options.scheduler.max_num_batched_tokens,
            cores=() if decision.cores == () else cores,
            threads=len(cores),
            kv_budget=decision.kv_budgets[rank],
            memory_utilization=options.cache.gpu_memory_utilization,
            comm_timeout_s=_comm_timeout(options),
            cost_share=decision.cost_shares[rank],
            max_in_flight=decision.max_in_flight,
            dp_rank=place.rank,
            dp_size=place.size,
            experts=cutting.experts or "",
            all2all=decision.all2all,
            group_store=place.rendezvous,
            group_key=place.key,
            address=place.address,
            meeting=place.meeting,
            draft_model_path=str(decision.draft_folder) if decision.draft_folder is not None else "",
            overrides=json.dumps(dict(decision.overrides)),
            draft_overrides=json.dumps(dict(decision.draft_overrides)),
            num_drafts=speculative.num_speculative_tokens if speculative is not None else 0,
            file_state=decision.file_states[0],
            draft_file_state=decision.file_states[1],
        )
        for rank, cores in enumerate(rank_cores(decision))
    ]


def shared_groups(options: EngineOptions) -> Any:
    """Where ranks meet that are threads, for several replicas."""
    return load("shoal.executors.threads:ThreadGroups")(_comm_timeout(options))


def _comm_timeout(options: EngineOptions) -> float:
    return max(options.parallel.step_timeout, options.parallel.start_timeout) + _COMM_GRACE_S


def _uni(setups: list[RankSetup], groups: Any) -> Links:
    links: Links = load("shoal.executors.inprocess:InProcessLinks")()
    return links


def _threads(setups: list[RankSetup], groups: Any) -> Links:
    links: Links = load("shoal.executors.threads:ThreadLinks")(len(setups), setups[0].comm_timeout_s, groups)
    return links


def _mp(setups: list[RankSetup], groups: Any) -> Links:
    links: Links = load("shoal.executors.multiprocess:ProcessLinks")(setups)
    return links


_LINKS: Mapping[str, Callable[[list[RankSetup], Any], Links]] = {
    "uni": _uni,
    "threads": _threads,
    "mp": _mp,
}
