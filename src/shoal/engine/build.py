"""Start the engine of a plan: its ranks, its scheduler and its grammars."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal import env
from shoal.devices import cpu
from shoal.engine.core import EngineCore
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.speculation import make_drafters
from shoal.errors import ConfigError, EngineError
from shoal.executors.base import RankExecutor
from shoal.executors.node_ranks import NodeListener
from shoal.executors.table import EXECUTORS, start_ranks
from shoal.log import get_logger
from shoal.planner.context_length import require_capacity, tokens_that_fit
from shoal.process.forks import Owner
from shoal.protocols import Lockstep
from shoal.text.grammar_host import grammar_pool
from shoal.wire.base import WIRE_VERSION
from shoal.wire.plan import EnginePlan
from shoal.wire.ranks import RankSetup

log = get_logger("engine")

AwaitNodes = Callable[[str, str], object]


def build_engine(
    plan: EnginePlan,
    *,
    own_process: bool = False,
    lockstep: Lockstep | None = None,
    groups: Any = None,
    await_nodes: AwaitNodes | None = None,
    on_close: Callable[[EngineError | None], object] = lambda _: None,
) -> EngineCore:
    """Start the ranks and the engine of a plan.

    Args:
        own_process: the process exists only for this engine, so it may be bound to cores.
        lockstep: the lockstep with the replicas that share experts with this one.
        groups: the groups of thread ranks of several replicas in this process (see `executors.table.thread_groups`).
        await_nodes: is called with the address at which the nodes of a replica over several hosts must come now, and
            the text that they must give there.
        on_close: see `EngineCore`.

    Raises:
        UserError: the ranks can't start with these options.
        EngineError: a rank failed while it started.
    """
    begun = time.monotonic()
    in_this_process = EXECUTORS[plan.executor].in_this_process
    if in_this_process:
        _check_threads_of_torch()
    incarnation = time.time_ns() if lockstep is None else lockstep.incarnation
    listener = NodeListener(plan, str(incarnation)) if plan.nodes_elsewhere else None
    if listener is not None and await_nodes is not None:
        await_nodes(listener.address, str(incarnation))
    setups = rank_setups(plan, incarnation, "" if listener is None else listener.address)
    first = plan.ranks[0]
    alone = in_this_process and len(plan.ranks) == 1 and first.device == "cpu"
    if alone and own_process and plan.bind_cores and "torch" not in sys.modules:
        env.set_defaults(cpu.pinning_environment(first.cores))
    links = start_ranks(plan.executor, setups, groups, listener)
    launched = time.monotonic() - begun
    shortest = plan.asked_model_len or plan.block_size
    executor = RankExecutor(
        links,
        setups,
        check_capacity=lambda blocks: require_capacity(blocks, plan.block_size, shortest),
        start_timeout=plan.timeouts.start_s,
        step_timeout=plan.timeouts.step_s,
        peers=lockstep,
    )
    executor.start_times = {"launch": launched, **executor.start_times}
    limits = SchedulerLimits(
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=tokens_that_fit(plan.max_model_len, executor.num_blocks, plan.block_size),
        window=plan.window,
        stages=plan.layout.num_stages,
        prompt_logprobs=plan.prompt_logprobs,
    )
    _log_ready(executor, plan.block_size, limits.max_model_len, time.monotonic() - begun)
    return EngineCore(
        executor,
        limits,
        block_size=plan.block_size,
        prefix_caching=plan.prefix_caching,
        max_in_flight=plan.max_in_flight,
        incarnation=incarnation,
        grammars=grammar_pool(
            Path(plan.tokenizer_folder or plan.model.folder), plan.eos, plan.vocab_size, plan.grammar_cores
        ),
        make_drafter=make_drafters(plan.speculative),
        lockstep=lockstep,
        memory_timeout=plan.timeouts.start_s,
        replica=plan.layout.replica,
        on_close=on_close,
    )


_first_in_process: list[Owner] = []  # the process that started ranks first; at most one entry


def _check_threads_of_torch() -> None:
    """Check that this process was not forked from one in which ranks have run.

    Raises:
        ConfigError: ranks have run in the process from which this one was forked.
    """
    if not _first_in_process:
        _first_in_process.append(Owner("rank"))
    if not _first_in_process[0].is_here:
        raise ConfigError(
            "a rank can't run in this process: it was forked from a process in which ranks have run, and a fork does "
            "not copy PyTorch's threads; start it with spawn instead of fork, or use --distributed-executor-backend mp"
        )


def _log_ready(executor: RankExecutor, block_size: int, max_model_len: int, seconds: float) -> None:
    tokens = executor.num_blocks * block_size
    log.info(
        "KV cache: %d blocks x %d = %d tokens, %.1f requests of %d",
        *(executor.num_blocks, block_size, tokens, tokens / max_model_len, max_model_len),
    )
    phases = ", ".join(f"{name} {took:.2f}" for name, took in executor.start_times.items())
    log.info("engine ready in %.2f s (%s)", seconds, phases)


def rank_setups(plan: EnginePlan, incarnation: int = 0, store: str = "") -> list[RankSetup]:
    """Return the first message to each rank.

    Args:
        incarnation: the number of this start of the engine.
        store: the address at which ranks of several hosts find each other.
    """
    return [RankSetup(WIRE_VERSION, incarnation, rank.rank, plan.on_node(rank.node), store) for rank in plan.ranks]
