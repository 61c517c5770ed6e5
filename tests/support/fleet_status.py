"""Made-up statuses of ranks, engines, replicas and fleets."""

from collections.abc import Sequence

from shoal.wire.engine import EngineStats
from shoal.wire.fleet import FleetStatus, ReplicaStatus
from shoal.wire.ranks import RankStats


def ranks(tp: int = 2, pp: int = 1, *, first_pid: int = 100, busy_us: int = 0) -> tuple[RankStats, ...]:
    return tuple(
        RankStats(
            number,
            first_pid + number,
            anonymous=(number + 1) << 20,
            anonymous_at_import=0,
            kv_bytes=1 << 18,
            weight_bytes=1 << 19,
            stage=number // tp,
            busy_us=busy_us,
        )
        for number in range(tp * pp)
    )


def engine(
    *,
    running: int = 0,
    waiting: int = 0,
    free: int = 100,
    prompt: int = 0,
    generated: int = 0,
    queries: int = 0,
    hits: int = 0,
    of_ranks: Sequence[RankStats] = (),
) -> EngineStats:
    return EngineStats(
        waiting=waiting,
        running=running,
        num_blocks=100,
        free_blocks=free,
        block_size=16,
        max_model_len=256,
        steps=1,
        prompt_tokens=prompt,
        generated_tokens=generated,
        prefix_queries=queries,
        prefix_hits=hits,
        preemptions=0,
        draft_tokens=0,
        accepted_tokens=0,
        schedule_us=1,
        step_total_us=1,
        step_forward_us=1,
        ranks=tuple(of_ranks),
    )


def replica(
    number: int,
    state: str = "ready",
    *,
    host: str = "alpha",
    since: float = 1.0,
    restarts: int = 0,
    cause: str = "",
    stats: EngineStats | None = None,
) -> ReplicaStatus:
    return ReplicaStatus(number, state, host, 50 + number, since, restarts, cause, 0, stats)


def fleet(
    *replicas: ReplicaStatus,
    uptime: float = 10.0,
    tp: int = 2,
    pp: int = 1,
    queued: int = 0,
    replays: int = 0,
    accepting: bool = True,
) -> FleetStatus:
    return FleetStatus("tiny", tp, pp, replicas, queued, replays, accepting, uptime)
