"""How prompts are spread over the steps in flight, and how long the stages of a pipeline wait."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.core import EngineCore
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.scheduler.prompt_chunking import PromptChunker
from shoal.wire.engine import EngineRequest
from support.fakes import FakePipeline, Outcomes, request, steady


def test_with_one_stage_a_chunk_is_as_large_as_the_budget() -> None:
    spread = PromptChunker(1, 100)
    assert spread.share(lambda: 5000) == 100
    spread.note_step(100)
    assert spread.share(lambda: 3) == 100
    assert spread.cut(70, 30) >= 30, "only the budget cuts a prompt"
    assert spread.cut(30, 70) == 30


@steady
@given(st.integers(2, 5), st.integers(1, 4096), st.integers(1, 20000))
def test_a_single_prompt_is_cut_into_even_chunks(stages: int, budget: int, left: int) -> None:
    spread = PromptChunker(stages, budget)
    chunks: list[int] = []
    while left:
        share = spread.share(partial(int, left))
        assert 0 < share <= budget
        count = min(spread.cut(left, share), budget)
        spread.note_step(count)
        chunks.append(count)
        left -= count
    least = -(-64 // (stages - 1))
    assert all(count >= min(least, budget) for count in chunks[:-1]), "tiny chunks"
    assert chunks[-1] >= min(least, budget) or len(chunks) == 1 or budget < 2 * least
    if budget >= 2 * least:
        assert max(chunks) - min(chunks) <= 64, "more tokens than the reading of weights is worth"


def test_the_end_of_a_backlog_is_spread_over_the_steps_in_flight() -> None:
    spread = PromptChunker(2, 2048)
    assert spread.share(lambda: 256) == 128
    spread.note_step(128)
    assert spread.share(lambda: 128) == 128


def test_a_step_exceeds_its_share_rather_than_cut_tiny_chunks() -> None:
    spread = PromptChunker(2, 2048)
    assert spread.cut(500, 3) == 64
    assert spread.cut(100, 80) == 100
    assert spread.cut(500, 0) == 0


def compute(stages: int, step_cost: float, specs: list[EngineRequest]) -> FakePipeline:
    pipeline = FakePipeline(1024, 16, stages=stages, step_cost=step_cost)
    core = EngineCore(
        pipeline,
        SchedulerLimits(64, 2048, 8192, stages=stages),
        block_size=16,
        prefix_caching=False,
        max_in_flight=stages + 1,
    )
    outcomes = Outcomes()
    for spec in specs:
        core.add(spec)
        outcomes.added(spec)
    while core.busy:
        outcomes.take(core.updates(0))
    assert not outcomes.open
    return pipeline


def slowest_stage(pipeline: FakePipeline, step_cost: float) -> float:
    return step_cost + max(sum(work.count for work in plan.work) for plan in pipeline.plans)


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "step_cost"), [(2, 256), (3, 10)])
def test_the_stages_of_a_pipeline_wait_little(stages: int, step_cost: float) -> None:
    """A stage waits at most S - 1 steps while the pipeline fills, and as long while it empties.

    Between these all steps in flight are alike, and no stage waits.
    """
    pipeline = compute(stages, step_cost, [request(seq, [seq] * 128, 64) for seq in range(64)])
    assert pipeline.idle_share <= 2 * (stages - 1) * slowest_stage(pipeline, step_cost) / pipeline.now
    assert pipeline.idle_share < 0.08


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("step_cost", [10, 64, 256])
def test_a_long_prompt_alone_keeps_all_stages_busy(stages: int, step_cost: float) -> None:
    """The chunks are small enough that filling and emptying the pipeline takes little time.

    With chunks of the step's budget, 2,000 tokens, a stage would wait for a third of the time with two stages, and for
    half of it with three.
    """
    pipeline = compute(stages, step_cost, [request(1, [1] * 4000, 1)])
    chunks = [sum(work.count for work in plan.work) for plan in pipeline.plans if plan.work]
    assert max(chunks) - min(chunks) <= 1
    everything = sum(chunks) + len(chunks) * step_cost
    assert pipeline.now == everything + (stages - 1) * slowest_stage(pipeline, step_cost)
    assert pipeline.idle_share < 0.15
