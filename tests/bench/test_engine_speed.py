"""The figures of a measured batch, over a fake engine."""

import time
from collections.abc import Sequence
from typing import Any

import pytest

from shoal.bench.engine_speed import BatchShape, MeasuredRun, SpeedMeter, medians, stage_idle
from shoal.cluster.stats import merge_stats
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest, EngineStats, Finish, SeqUpdate
from shoal.wire.ranks import RankStats

ENGINE: dict[str, Any] = dict.fromkeys(EngineStats.__struct_fields__[: -len(EngineStats.__struct_defaults__)], 0)


def engine(pid: int, *busy_s: float, steps: int = 0) -> EngineStats:
    """Return statistics of a replica with one rank per stage, in processes `pid`, `pid` + 1, ..."""
    ranks = tuple(
        RankStats(stage, pid + stage, 0, 0, 0, 0, stage=stage, busy_us=int(busy * 1e6))
        for stage, busy in enumerate(busy_s)
    )
    return EngineStats(**{**ENGINE, "steps": steps, "step_forward_us": 100 * steps}, ranks=ranks)


def test_a_stages_idle_share_is_the_mean_of_its_ranks() -> None:
    before = merge_stats([engine(10, 1, 1), engine(20, 2, 0)])
    after = merge_stats([engine(10, 9, 5), engine(20, 6, 2)])
    assert stage_idle(before, after, 10) == pytest.approx((0.4, 0.7))


def test_tensor_parallel_ranks_of_one_process() -> None:
    ranks = [RankStats(rank, 7, 0, 0, 0, 0, busy_us=1_000_000 * rank) for rank in range(2)]
    after = EngineStats(**ENGINE, ranks=tuple(ranks))
    before = replace_fields(after, ranks=tuple(replace_fields(rank, busy_us=0) for rank in ranks))
    assert stage_idle(before, after, 2) == pytest.approx((0.75,))


def test_a_replica_that_died_does_not_count() -> None:
    """The ranks of the other replicas may get the positions of its ranks."""
    before = merge_stats([engine(10, 900, 800), engine(20, 2, 0)])
    after = merge_stats([engine(20, 6, 2)])
    assert stage_idle(before, after, 10) == pytest.approx((0.6, 0.8))


def test_the_idle_share_is_never_negative() -> None:
    assert stage_idle(engine(10, 0, 0), engine(10, 11, 5), 10) == pytest.approx((0.0, 0.5))


class Instant:
    """An engine that answers at once. Each call of `stats` counts `steps` more steps."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._looks = 0
        self._added: list[int] = []

    def add(self, request: EngineRequest) -> None:
        self._added.append(request.seq)

    def abort(self, seqs: Sequence[int]) -> None:
        raise NotImplementedError

    def updates(self, timeout: float) -> list[SeqUpdate]:
        added, self._added = self._added, []
        return [SeqUpdate(seq, (5,), finish=Finish.LENGTH) for seq in added]

    def stats(self) -> EngineStats:
        self._looks += 1
        return engine(10, *[0.0] * self._stages, steps=4 * self._looks)

    def close(self) -> None:
        pass


def test_control_time_is_reported_only_with_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    one, two = (SpeedMeter(Instant(stages), 100).run(BatchShape(2, 3, 1)) for stages in (1, 2))
    assert one.control_us_per_step == pytest.approx(one.seconds * 1e6 / 4 - 100)
    assert (two.control_us_per_step, two.forward_us_per_step) == (None, 100)
    runs: list[MeasuredRun] = [two, two]
    assert medians(runs)["control_us_per_step"] is None
    assert medians(runs)["stage_idle"] == [1, 1]
    assert medians([one])["control_us_per_step"] == one.control_us_per_step
