"""Counts of the steps and the ranks of an engine, and its stats."""

from collections.abc import Collection, Sequence

from shoal.engine.blocks import BlockPool
from shoal.engine.scheduler.scheduler import Scheduler
from shoal.wire.base import Ids, replace_fields
from shoal.wire.engine import EngineStats
from shoal.wire.ranks import RankStats, StepPlan, StepResult
from shoal.wire.traffic import Traffic, sum_traffic

_NUM_TOKEN_BUCKETS = 24  # buckets of the histogram of tokens per step; the upper bounds are 1, 2, 4, ...


class StepCounts:
    """Counts of the steps that were computed, of their tokens and of their time."""

    def __init__(self) -> None:
        self.steps = 0
        self.total_us = 0
        self.forward_us = 0
        self.tokens = 0
        self.iteration_tokens = [0] * _NUM_TOKEN_BUCKETS

    def note_plan(self, plan: StepPlan) -> None:
        tokens = sum(work.count for work in plan.work)
        if tokens:
            self.iteration_tokens[min((tokens - 1).bit_length(), _NUM_TOKEN_BUCKETS - 1)] += 1
            self.tokens += tokens

    def note_result(self, result: StepResult) -> None:
        self.steps += 1
        self.total_us += result.times.total_us
        self.forward_us += result.times.forward_us


class RankCounts:
    """The stats that the ranks gave last, and the work of ranks that were replaced since."""

    def __init__(self) -> None:
        self.latest: tuple[RankStats, ...] = ()
        self.replacements = 0
        self.traffic_before: tuple[Traffic, ...] = ()  # of processes that ranks had before the present ones
        self._busy_before: dict[int, int] = {}

    def note(self, latest: Sequence[RankStats]) -> None:
        self.latest = tuple(latest)

    def note_replacement(self, ranks: Collection[int]) -> None:
        """Note that these ranks are replaced. What they have done still counts."""
        self.replacements += len(ranks)
        for rank in self.latest:
            if rank.rank in ranks:
                self._busy_before[rank.rank] = self._busy_before.get(rank.rank, 0) + rank.busy_us
                self.traffic_before = sum_traffic([*self.traffic_before, *rank.traffic])
        self.latest = tuple(
            replace_fields(rank, busy_us=0, stage_wait_us=0, traffic=()) if rank.rank in ranks else rank
            for rank in self.latest
        )

    @property
    def busy_before(self) -> Ids:
        """The microseconds of work, by rank, of the processes that the rank had before the present one."""
        return tuple(self._busy_before.get(rank, 0) for rank in range(max(self._busy_before, default=-1) + 1))


def describe_engine(scheduler: Scheduler, pool: BlockPool, steps: StepCounts, ranks: RankCounts) -> EngineStats:
    """Return the stats of an engine, as far as these parts know them. The rest is 0 or empty."""
    counters = scheduler.counters
    return EngineStats(
        waiting=scheduler.num_waiting,
        running=scheduler.num_running,
        num_blocks=pool.num_blocks,
        free_blocks=pool.num_free,
        block_size=pool.block_size,
        max_model_len=0,
        steps=steps.steps,
        prompt_tokens=counters.prompt_tokens,
        generated_tokens=counters.generated_tokens,
        prefix_queries=counters.prefix_queries,
        prefix_hits=counters.prefix_hits,
        preemptions=counters.preemptions,
        draft_tokens=counters.draft_tokens,
        accepted_tokens=counters.accepted_tokens,
        schedule_us=0,
        step_total_us=steps.total_us,
        step_forward_us=steps.forward_us,
        ranks=ranks.latest,
        busy_before=ranks.busy_before,
        iteration_tokens=tuple(steps.iteration_tokens),
        step_tokens=steps.tokens,
        drafts=counters.drafts,
        accepted_by_position=tuple(counters.accepted_by_position),
        rank_replacements=ranks.replacements,
        traffic_before=ranks.traffic_before,
    )
