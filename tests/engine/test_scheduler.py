"""The scheduler, plan by plan. Hypothesis chooses the order of events; the fake ranks check every plan."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.engine.blocks import BlockPool
from shoal.engine.request import RequestState
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.scheduler.scheduler import Scheduler
from shoal.engine.scheduler.waiting_queue import PriorityPolicy
from shoal.engine.speculation import Drafter
from shoal.errors import EngineError, RequestError
from shoal.wire.engine import EngineRequest, Finish
from shoal.wire.ranks import SeqOut, StepPlan, StepResult, StepTimes
from shoal.wire.tokens import encode_tokens, token_set
from support.fakes import FakeClock, FakeExecutor, Outcomes, alone, begun, next_token, request, steady

MAX_MODEL_LEN = 20


class Oracle:
    """A drafter that is right for a number of tokens, which depends on the text, and then wrong."""

    def __init__(self, count: int, lookahead: int = 0) -> None:
        self.lookahead = lookahead
        self._count = count
        self._tokens: list[int] = []

    def accept(self, tokens: Sequence[int], drafts: Sequence[int]) -> None:
        self._tokens += tokens

    def propose(self, count: int) -> tuple[int, ...]:
        found: list[int] = []
        for i in range(min(count, self._count)):
            token = next_token([*self._tokens, *found])
            found.append(token if (len(self._tokens) + i) % 3 else token + 1)
        return tuple(found)


class Bench:
    """A scheduler and ranks, driven by hand: `plan` plans a step, `land` applies the oldest result."""

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        max_num_seqs: int = 8,
        budget: int = 64,
        max_model_len: int = 64,
        prefix_caching: bool = True,
        make_drafter: Callable[[], Drafter | None] = lambda: None,
        lookahead: int = 0,
        window: int | None = None,
        stages: int = 1,
        prompt_logprobs: int | None = None,
    ) -> None:
        self.limits = SchedulerLimits(max_num_seqs, budget, max_model_len, window, stages, prompt_logprobs)
        self.pool = BlockPool(num_blocks, block_size)
        self.clock = FakeClock()
        self.scheduler = Scheduler(
            self.pool,
            self.limits,
            PriorityPolicy(),
            self.clock,
            prefix_caching=prefix_caching,
            make_drafter=make_drafter,
        )
        self.executor = FakeExecutor(
            num_blocks,
            block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            lookahead=lookahead,
            window=window,
            stages=stages,
        )
        self.outcomes = Outcomes()

    def add(self, spec: EngineRequest) -> None:
        self.scheduler.add(spec)
        self.outcomes.added(spec)

    def abort(self, *seqs: int) -> None:
        self.outcomes.may_abort.update(seqs)
        self.scheduler.abort(seqs)
        self.take()

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.executor.launch(plan)
        self.take()
        return plan

    def plan_step(self) -> StepPlan:
        plan = self.plan()
        assert plan is not None
        return plan

    def land(self) -> None:
        for result in self.executor.poll(0):
            self.scheduler.apply(result)
        self.take()

    def step(self) -> StepPlan:
        plan = self.plan_step()
        self.land()
        return plan

    def take(self) -> None:
        self.outcomes.take(self.scheduler.take_updates())

    def drain(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if self.scheduler.idle:
                break
            self.plan()
            self.land()
        assert self.scheduler.idle, "requests starve"
        self.scheduler.audit()
        assert self.executor.known == set()
        assert self.outcomes.open == []


def spans(plan: StepPlan) -> dict[int, tuple[int, int]]:
    """Return {seq: (start, count)} of a plan's works."""
    return {work.seq: (work.start, work.count) for work in plan.work}


def test_a_prompt_longer_than_the_budget_is_computed_in_chunks() -> None:
    bench = Bench(budget=4)
    bench.add(request(1, range(10), 2))
    assert [spans(bench.step()) for _ in range(4)] == [{1: (0, 4)}, {1: (4, 4)}, {1: (8, 2)}, {1: (10, 1)}]
    assert [work.sample for plan in bench.executor.plans for work in plan.work] == [False, False, True, True]
    assert [len(work.blocks) for plan in bench.executor.plans for work in plan.work] == [1, 1, 1, 0]
    bench.drain()


def test_running_requests_get_tokens_while_a_long_prompt_is_chunked() -> None:
    bench = Bench(budget=4)
    bench.add(request(1, [5], 9))
    bench.step()
    bench.add(request(2, range(9), 1, priority=-1))
    plans = [spans(bench.step()) for _ in range(3)]
    assert plans == [{1: (1, 1), 2: (0, 3)}, {1: (2, 1), 2: (3, 3)}, {1: (3, 1), 2: (6, 3)}]
    bench.drain()


def test_the_next_step_is_planned_before_the_previous_token_is_known() -> None:
    bench = Bench()
    bench.add(request(1, [1, 2, 3], 3))
    assert [spans(bench.plan_step()) for _ in range(3)] == [{1: (0, 3)}, {1: (3, 1)}, {1: (4, 1)}]
    assert bench.plan() is None, "the last token of the request is planned"
    bench.land()
    assert bench.outcomes.tokens[1] == alone(bench.outcomes.specs[1])[:1]
    bench.land()
    bench.land()
    bench.drain()


def test_a_token_planned_after_a_stop_token_is_dropped() -> None:
    bench = Bench()
    stop = alone(request(1, [1, 2, 3], 9))[1]
    spec = request(1, [1, 2, 3], 9, stop_ids=[stop])
    assert len(alone(spec)) == 2
    bench.add(spec)
    for _ in range(3):
        bench.plan_step()
    bench.land()
    bench.land()
    assert bench.outcomes.finished[1].finish is Finish.STOP
    assert bench.pool.num_free == 16
    bench.land()
    assert bench.outcomes.tokens[1] == alone(spec)
    assert bench.plan_step().released == (1,)
    bench.land()
    bench.drain()
    assert bench.scheduler.counters.generated_tokens == 2


def test_a_preempted_request_resumes_when_its_results_have_come() -> None:
    """There are three blocks of two tokens. The second request is preempted and resumes with the tokens that it had."""
    bench = Bench(num_blocks=3, block_size=2, max_model_len=6, prefix_caching=False)
    bench.add(request(1, [1], 5))
    bench.add(request(2, [2], 3))
    bench.plan_step()  # a block each
    bench.plan_step()
    third = bench.plan_step()  # the first one takes the last block, the second has none
    assert spans(third) == {1: (2, 1)}
    assert third.released == (2,)
    assert bench.scheduler.counters.preemptions == 1
    bench.land()
    fourth = bench.plan_step()
    assert not fourth.new, "a result of the preempted request is still in flight"
    bench.land()
    while not bench.executor.plans[-1].new:
        bench.plan()
        bench.land()
    (again,) = bench.executor.plans[-1].new
    assert (again.seq, again.epoch) == (2, 1)
    assert len(again.tokens) == 4 * 3, "the prompt and two tokens"
    bench.drain()


def test_a_preempted_request_loses_its_work_in_the_same_step() -> None:
    """Next tokens are planned before chunks, so a late request may have taken the block that an earlier chunk needs."""
    bench = Bench(num_blocks=22, block_size=1, budget=4, max_model_len=20, prefix_caching=False)
    bench.add(request(1, [1] * 5, 12, priority=1))
    bench.step()
    bench.step()
    bench.add(request(2, [2] * 14, 3))
    while not bench.scheduler.counters.preemptions:
        plan = bench.step()
    assert spans(plan) == {2: (12, 2)}
    assert plan.released == (1,)
    bench.drain()


def test_the_last_request_in_the_policys_order_is_preempted() -> None:
    bench = Bench(num_blocks=3, block_size=2, max_model_len=6, prefix_caching=False)
    bench.add(request(1, [1], 4, priority=1))
    bench.add(request(2, [2], 4))
    while not bench.scheduler.counters.preemptions:
        bench.step()
    assert bench.executor.plans[-1].released == (1,)
    bench.drain()


def test_requests_are_served_by_priority_then_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    for seq, priority in [(1, 0), (2, 0), (3, -1), (4, 5)]:
        bench.add(request(seq, [seq], 1, priority=priority))
    order = []
    while not bench.scheduler.idle:
        order += [new.seq for new in bench.step().new]
    assert order == [3, 1, 2, 4]


def test_no_request_overtakes_a_prompt_that_waits_for_room() -> None:
    bench = Bench(num_blocks=4, block_size=4, max_model_len=16)
    bench.add(request(1, range(8), 8))
    bench.step()
    bench.add(request(2, range(20, 32), 2))
    bench.add(request(3, [9], 1))
    assert not bench.step().new
    bench.drain()
    admitted = [new.seq for plan in bench.executor.plans for new in plan.new]
    assert admitted == [1, 2, 3]


def test_a_cached_prompt_is_not_computed_again() -> None:
    bench = Bench()
    bench.add(request(1, range(9), 1))
    bench.step()
    bench.add(request(2, range(9), 1))
    assert spans(bench.step()) == {2: (8, 1)}
    bench.add(request(3, range(9), 1, salt="other"))
    assert spans(bench.step()) == {3: (0, 9)}
    assert [bench.outcomes.finished[seq].cached_tokens for seq in (1, 2, 3)] == [0, 8, 0]
    assert bench.scheduler.counters.prefix_hits == 8
    assert bench.scheduler.counters.prefix_queries == 27
    bench.drain()


def test_a_fully_cached_prompt_is_not_written_again() -> None:
    """Its last token is computed again, to draw the next one; both requests share the block."""
    bench = Bench()
    bench.add(request(1, range(8), 3))
    bench.add(request(2, range(8), 3))
    assert spans(bench.step()) == {1: (0, 8), 2: (7, 1)}
    assert bench.pool.num_free == 16 - 2
    bench.drain()


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_the_outputs_of_one_prompt_share_its_blocks(prefix_caching: bool) -> None:
    bench = Bench(prefix_caching=prefix_caching)
    for seq in range(4):
        bench.add(request(seq, range(12), 2, group=0))
    assert spans(bench.step()) == {0: (0, 12), 1: (11, 1), 2: (11, 1), 3: (11, 1)}
    assert bench.pool.num_free == 16 - 3
    bench.drain()
    bench.add(request(9, range(12), 2))
    assert spans(bench.step()) == {9: (11, 1) if prefix_caching else (0, 12)}
    bench.drain()


def test_right_drafts_are_kept_and_nothing_is_planned_after_unknown_ones() -> None:
    bench = Bench(make_drafter=lambda: Oracle(4))
    bench.add(request(1, [1, 2, 3, 4], 9))
    bench.plan_step()
    assert bench.plan() is None, "drafts need known tokens before them"
    bench.land()
    (work,) = bench.plan_step().work
    assert (work.start, work.count, len(work.drafts)) == (4, 5, 4)
    bench.land()
    assert len(bench.outcomes.tokens[1]) == 1 + 2, "tokens drawn after a wrong draft are dropped"
    (work,) = bench.plan_step().work
    assert work.start == 6
    bench.land()
    bench.drain()
    counters = bench.scheduler.counters
    assert counters.generated_tokens == 9
    assert 0 < counters.accepted_tokens < counters.draft_tokens


def test_drafts_never_go_beyond_max_tokens() -> None:
    bench = Bench(make_drafter=lambda: Oracle(4))
    bench.add(request(1, [1, 2], 3))
    bench.step()
    (work,) = bench.step().work
    assert len(work.drafts) == 1
    bench.drain()


def test_a_draft_model_gets_spare_blocks() -> None:
    bench = Bench(num_blocks=3, block_size=4, max_model_len=12, make_drafter=lambda: Oracle(3, 3), lookahead=3)
    bench.add(request(1, range(4), 8))
    (work,) = bench.step().work
    assert len(work.blocks) == 2
    bench.drain()


def test_blocks_outside_the_window_are_released() -> None:
    """With a window of 4 and blocks of 2, a text of any length holds two or three blocks in the window, the one that is
    written, and one for the prefix cache."""
    bench = Bench(num_blocks=16, block_size=2, window=4)
    bench.add(request(1, range(8), 16))
    held = []
    while not bench.scheduler.idle:
        bench.step()
        held.append(16 - bench.pool.num_free)
    assert max(held[1:]) <= 5
    bench.drain()
    bench.add(request(2, range(9), 2))
    assert spans(bench.step()) == {2: (8, 1)}, "released blocks are still found"
    bench.drain()


def test_a_prompt_with_logprobs_is_computed_though_it_is_cached() -> None:
    bench = Bench()
    bench.add(request(1, range(9), 1))
    bench.step()
    bench.add(with_prompt_logprobs(request(2, range(9), 1)))
    assert spans(bench.step()) == {2: (0, 9)}
    bench.drain()


def test_long_cached_prompts_are_admitted_a_few_per_step() -> None:
    """There is nothing to compute, but the lookup of each prompt takes time."""
    bench = Bench(num_blocks=40, block_size=1 << 13, budget=1 << 18, max_model_len=1 << 17)
    prompt = [1] * (1 << 16)
    bench.add(request(1, prompt, 1))
    bench.step()
    for seq in range(2, 8):
        bench.add(request(seq, prompt, 1))
    assert [sorted(spans(bench.step())) for _ in range(2)] == [[2, 3, 4, 5], [6, 7]]
    bench.drain()


def test_prompt_logprobs_per_step_are_limited() -> None:
    """Each step gives log-probabilities of five prompt tokens, and of one more for each request beyond them."""
    bench = Bench(prompt_logprobs=5)
    told = with_prompt_logprobs(request(1, range(9), 2)), with_prompt_logprobs(request(2, range(20, 27), 1))
    for spec in (*told, request(3, range(40, 50), 1)):
        bench.add(spec)
    steps = [spans(bench.step()) for _ in range(4)]
    assert steps == [
        {1: (0, 5), 2: (0, 1), 3: (0, 10)},
        {1: (5, 4), 2: (1, 2)},  # the last token of a prompt has no next prompt token
        {1: (9, 1), 2: (3, 4)},
        {},
    ]  # fmt: skip
    bench.drain()


def with_prompt_logprobs(spec: EngineRequest) -> EngineRequest:
    """Return the request with log-probabilities of its prompt."""
    return msgspec.structs.replace(spec, sampling=msgspec.structs.replace(spec.sampling, prompt_logprobs=0))


def test_two_requests_of_one_step_share_the_blocks_of_a_common_prefix() -> None:
    bench = Bench()
    bench.add(request(1, range(9), 3))
    bench.add(request(2, [*range(8), 5, 5], 3))
    assert spans(bench.step()) == {1: (0, 9), 2: (8, 2)}
    assert bench.pool.num_free == 16 - 4
    bench.drain()


def test_a_chunk_is_found_by_a_request_admitted_in_the_same_step() -> None:
    bench = Bench(budget=8)
    bench.add(request(1, range(13), 1))
    bench.step()
    bench.add(request(2, [*range(12), 9, 9], 1))
    assert spans(bench.step()) == {1: (8, 5), 2: (12, 2)}
    bench.drain()


def test_an_aborted_request_frees_its_blocks_at_once() -> None:
    bench = Bench(prefix_caching=False)
    bench.add(request(1, range(9), 5))
    bench.add(request(2, range(4), 5))
    bench.plan_step()
    bench.abort(1, 1, 77)
    assert bench.pool.num_free == 15
    assert bench.outcomes.finished[1].finish is Finish.ABORT
    bench.abort(1)
    bench.land()
    assert bench.plan_step().released == (1,)
    bench.land()
    bench.drain()
    assert bench.outcomes.finished[2].finish is Finish.LENGTH


def test_ranks_forget_the_last_request_too() -> None:
    bench = Bench()
    bench.add(request(1, [1], 1))
    bench.step()
    assert bench.executor.known == {1}
    assert not bench.scheduler.idle
    plan = bench.step()
    assert (plan.work, plan.released) == ((), (1,))
    assert bench.scheduler.idle
    assert bench.plan() is None


def test_a_deadline_ends_a_request_in_any_state() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add(request(1, [1], 9, deadline=bench.clock.now + 5))
    bench.add(request(2, [2], 9, deadline=bench.clock.now + 5))
    bench.add(request(3, [3], 2, deadline=bench.clock.now + 6))
    bench.outcomes.may_abort |= {1, 2}
    bench.plan_step()
    bench.clock.now += 5
    assert spans(bench.plan_step()) == {3: (0, 1)}
    for seq in (1, 2):
        assert bench.outcomes.finished[seq].finish is Finish.ABORT
        assert "deadline" in bench.outcomes.finished[seq].error
    bench.land()
    bench.drain()
    bench.clock.now += 5
    assert bench.plan() is None
    assert bench.outcomes.finished[3].finish is Finish.LENGTH


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 1), ([1], 0), ([1] * 60, 5)])
def test_a_request_that_can_never_run_is_refused(prompt: list[int], max_tokens: int) -> None:
    bench = Bench()
    with pytest.raises(RequestError, match="request 1"):
        bench.scheduler.add(request(1, prompt, max_tokens))
    assert bench.scheduler.idle


def test_a_sequence_number_in_use_is_refused() -> None:
    bench = Bench()
    bench.add(request(1, [1]))
    with pytest.raises(RequestError, match="exists"):
        bench.scheduler.add(request(1, [1]))
    bench.drain()


@pytest.mark.parametrize("answered", [1, 0, 5])
def test_a_result_out_of_order_is_an_error_and_never_a_wrong_token(answered: int) -> None:
    bench = Bench()
    bench.add(request(1, [1], 5))
    for _ in range(3):
        bench.plan_step()
    if answered == 0:  # twice
        bench.land()
    with pytest.raises(EngineError, match=f"step {answered}"):
        bench.scheduler.apply(StepResult(0, answered, (), StepTimes(0, 0)))


def test_a_token_of_another_epoch_is_dropped() -> None:
    bench = Bench()
    bench.add(request(1, [1], 5))
    bench.plan_step()
    bench.scheduler.apply(StepResult(0, 0, (SeqOut(1, 3, (5,)),), StepTimes(0, 0)))
    assert bench.scheduler.take_updates() == []


def test_the_audit_raises_if_a_request_was_lost() -> None:
    bench = Bench()
    bench.add(request(1, [1], 5))
    bench.step()
    bench.scheduler.running[0].state = RequestState.DRAINING
    with pytest.raises(EngineError, match="have this state"):
        bench.scheduler.audit()


# --- pipelines ---------------------------------------------------------------------------------------------------


def sequences(plan: StepPlan) -> list[int]:
    return [work.seq for work in plan.work]


@pytest.mark.slow
@settings(steady, max_examples=60)
@given(st.integers(2, 4), st.integers(1, 20), st.integers(0, 1), st.integers(1, 6), st.booleans())
def test_running_requests_are_spread_evenly_over_the_steps_in_flight(
    stages: int, requests: int, spare_depth: int, prompt: int, drafting: bool
) -> None:
    """While no request starts or ends, each has a turn every S steps, and these steps differ by at most one in size."""
    bench = Bench(
        num_blocks=400,
        max_num_seqs=20,
        max_model_len=80,
        stages=stages,
        make_drafter=lambda: Oracle(0) if drafting else None,
    )
    for seq in range(requests):
        bench.add(request(seq, [seq] * prompt, 40 + prompt))
    for _ in range(60):
        if bench.scheduler.num_in_flight == stages + spare_depth or bench.plan() is None:
            bench.land()
    plans = bench.executor.plans
    settled = [plan for plan in plans if plan.step > max(p.step for p in plans if p.new) + 2 * stages]
    assert len(settled) > 2 * stages
    # A drafter needs the last token. With a spare plan in flight the token may be unknown when it is a request's turn.
    # Then its turn comes a step later, or two if another request has taken its place in that step; and over more than
    # two stages the steps may differ by more than one.
    late = 2 if drafting and spare_depth else 0
    if requests >= stages:
        steps = {seq: [plan.step for plan in settled if seq in sequences(plan)] for seq in range(requests)}
        assert all(
            stages <= after - before <= stages + late for each in steps.values() for before, after in pairwise(each)
        )
        assert all(each[0] <= settled[0].step + stages + late - 1 for each in steps.values())
    if not late or stages == 2:
        for i in range(len(settled) - stages):
            sizes = [len(plan.work) for plan in settled[i : i + stages]]
            assert max(sizes) - min(sizes) <= 1
    bench.drain(4000)


def test_a_single_request_is_planned_one_step_ahead_with_any_number_of_stages() -> None:
    bench = Bench(stages=3)
    bench.add(request(1, [1, 2, 3], 5))
    assert [spans(bench.plan_step()) for _ in range(2)] == [{1: (0, 3)}, {1: (3, 1)}]
    assert bench.plan() is None
    bench.add(request(2, [2], 5))
    assert spans(bench.plan_step()) == {2: (0, 1)}, "a new request waits for no more than that"
    bench.drain()


def test_requests_that_wait_for_a_token_give_way_to_prompts() -> None:
    bench = Bench(stages=2, budget=1000, max_model_len=1000, num_blocks=400)
    bench.add(request(1, [1], 9))
    bench.step()
    bench.plan_step()
    bench.add(request(2, [2] * 600, 9))
    plan = bench.plan_step()
    assert 1 not in spans(plan)
    assert 64 <= spans(plan)[2][1] < 600
    bench.drain()


def test_chunks_of_a_prompt_follow_each_other() -> None:
    bench = Bench(stages=2, budget=1000, max_model_len=1000, num_blocks=400)
    bench.add(request(1, range(400), 3))
    plans = [bench.plan_step() for _ in range(3)]
    assert [spans(plan) for plan in plans] == [{1: (0, 134)}, {1: (134, 133)}, {1: (267, 133)}]
    assert [work.sample for plan in plans for work in plan.work] == [False, False, True]
    bench.drain()


def test_new_requests_are_spread_over_the_steps_in_flight() -> None:
    """These are short prompts, which would all fit into one step, and outputs of one prompt, with one token each."""
    for group in (-1, 7):
        bench = Bench(stages=2, max_num_seqs=16, num_blocks=64)
        for seq in range(16):
            bench.add(request(seq, range(9), 4, group=group))
        assert [len(bench.plan_step().work) for _ in range(4)] == [8, 8, 8, 8]
        bench.drain()


def test_aborted_requests_do_not_hide_waiting_ones() -> None:
    bench = Bench(stages=2, max_num_seqs=4)
    for seq in range(8):
        bench.add(request(seq, [seq] * 5, 3))
    bench.abort(0, 1, 2, 3)
    assert spans(bench.plan_step())
    bench.drain()


def test_with_a_short_budget_the_policy_alone_decides() -> None:
    bench = Bench(stages=2, budget=2, max_num_seqs=8, make_drafter=lambda: Oracle(0))
    for seq in range(6):
        bench.add(request(seq, [seq], 20, priority=seq))
    assert [set(spans(bench.plan_step())) for _ in range(3)] == [{0, 1}, {2, 3}, {4, 5}]
    bench.land()
    assert set(spans(bench.plan_step())) == {0, 1}
    bench.land()
    bench.land()
    bench.land()
    assert set(spans(bench.plan_step())) == {0, 1}, "though the others wait"
    bench.land()
    bench.drain()


def test_with_a_large_budget_requests_that_have_waited_longest_go_first() -> None:
    """This holds also if every token is known before the next step is planned."""
    bench = Bench(stages=2)
    for seq in range(4):
        bench.add(request(seq, [seq], 20, priority=-seq))
    while bench.scheduler.num_waiting:
        bench.step()
    first, second = set(spans(bench.step())), set(spans(bench.step()))
    assert first | second == {0, 1, 2, 3}
    assert set(spans(bench.step())) == first
    bench.drain()


def test_a_preempted_request_of_a_pipeline_resumes() -> None:
    bench = Bench(num_blocks=8, block_size=2, max_model_len=16, prefix_caching=False, stages=3, max_num_seqs=6)
    for seq in range(6):
        bench.add(request(seq, [seq], 12))
    for _ in range(300):
        if bench.scheduler.num_in_flight == 4 or bench.plan() is None:
            bench.land()
    bench.drain()
    assert bench.scheduler.counters.preemptions > 0


# --- requests that another engine began ----------------------------------------------------------------------------


def test_ranks_learn_where_the_prompt_of_a_continued_request_ends() -> None:
    bench = Bench()
    bench.add(begun(request(1, range(5), 9), 3))
    plan = bench.step()
    assert spans(plan) == {1: (0, 8)}
    (new,) = plan.new
    assert (new.num_prompt_tokens, len(new.tokens), new.epoch) == (5, 8 * 4, 0)
    bench.drain()
    assert len(bench.outcomes.tokens[1]) == 9
    counters = bench.scheduler.counters
    assert (counters.prompt_tokens, counters.generated_tokens) == (5, 6)


def test_tokens_that_came_with_a_request_are_not_encoded_again() -> None:
    bench = Bench(num_blocks=3, block_size=2, max_model_len=6, prefix_caching=False)
    specs = [request(1, [1], 5), begun(request(2, [2], 5), 1)]
    for spec in specs:
        bench.add(spec)
    assert [new.tokens for new in bench.plan_step().new] == [spec.tokens for spec in specs]
    assert all(new.tokens is spec.tokens for new, spec in zip(bench.executor.plans[0].new, specs, strict=True))
    bench.land()
    bench.drain()
    (again,) = [new for plan in bench.executor.plans[1:] for new in plan.new]
    assert again.tokens.startswith(specs[again.seq - 1].tokens), "tokens that were drawn since follow them"
    assert len(again.tokens) > len(specs[again.seq - 1].tokens)


def test_cached_output_tokens_do_not_count_as_cached_prompt_tokens() -> None:
    bench = Bench()
    spec = request(1, range(5), 9)
    bench.add(spec)
    bench.drain()
    bench.add(begun(msgspec.structs.replace(spec, seq=2), 7))
    assert spans(bench.step()) == {2: (11, 1)}, "twelve tokens are there, three blocks of them are cached"
    bench.drain()
    assert bench.outcomes.finished[2].cached_tokens == 5


def test_prompt_logprobs_of_a_continued_request_are_computed_again() -> None:
    bench = Bench()
    spec = request(1, range(9), 6)
    wanted = with_prompt_logprobs(msgspec.structs.replace(spec, seq=2))
    bench.add(spec)
    bench.drain()
    bench.add(begun(wanted, 3))
    assert spans(bench.step()) == {2: (0, 12)}
    bench.drain()


@pytest.mark.parametrize("count", [-1, 0, 4])
def test_a_prompt_that_is_longer_than_the_tokens_is_refused(count: int) -> None:
    bench = Bench()
    with pytest.raises(RequestError, match=f"request 1: its prompt has {count} tokens; it must have 1 to 3"):
        bench.scheduler.add(msgspec.structs.replace(request(1, [1, 2, 3]), num_prompt_tokens=count))
    assert bench.scheduler.idle


# Few different prompts, so that they share prefixes.
PROMPTS = st.builds(
    lambda base, tail: [*base, *tail],
    st.sampled_from([[], [1, 1, 1, 1], [1, 1, 2, 2, 1, 1, 2, 2], [1] * 9]),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Plans and results come in any sequence in which results keep the order of their plans."""

    @initialize(
        block_size=st.integers(1, 4),
        spare=st.integers(0, 6),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 16),
        stages=st.sampled_from([1, 1, 2, 3]),
        spare_depth=st.integers(-2, 2),
        prefix_caching=st.booleans(),
        num_drafts=st.sampled_from([0, 0, 1, 4]),
        lookahead=st.sampled_from([0, 3]),
        window=st.sampled_from([None, None, 1, 5]),
    )
    def start(
        self,
        block_size: int,
        spare: int,
        max_num_seqs: int,
        budget: int,
        stages: int,
        spare_depth: int,
        prefix_caching: bool,
        num_drafts: int,
        lookahead: int,
        window: int | None,
    ) -> None:
        self.depth = max(stages + spare_depth, 1)
        self.bench = Bench(
            num_blocks=-(-MAX_MODEL_LEN // block_size) + spare,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            budget=budget,
            max_model_len=MAX_MODEL_LEN,
            prefix_caching=prefix_caching,
            make_drafter=lambda: Oracle(num_drafts, lookahead) if num_drafts else None,
            lookahead=lookahead,
            window=window,
            stages=stages,
        )

    @rule(
        prompt=PROMPTS,
        max_tokens=st.integers(1, 7),
        stop_ids=st.sets(st.integers(0, 6), max_size=2),
        priority=st.integers(0, 2),
        lifetime=st.none() | st.integers(1, 9),
        salt=st.sampled_from(["", "", "a"]),
        outputs=st.sampled_from([1, 1, 2]),
        done=st.sampled_from([0, 0, 0, 1, 3]),
    )
    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        stop_ids: set[int],
        priority: int,
        lifetime: int | None,
        salt: str,
        outputs: int,
        done: int,
    ) -> None:
        deadline = None if lifetime is None else self.bench.clock.now + lifetime
        group = len(self.bench.outcomes.specs)
        for seq in range(group, group + outputs):
            spec = request(
                seq,
                prompt,
                max_tokens,
                stop_ids=sorted(stop_ids),
                priority=priority,
                deadline=deadline,
                salt=salt,
                group=group if outputs > 1 else -1,
            )
            self.bench.add(begun(spec, done) if done else spec)
        self.bench.take()

    @precondition(lambda self: self.bench.scheduler.num_in_flight < self.depth)
    @rule()
    def plan(self) -> None:
        scheduler = self.bench.scheduler
        expired = {s for s in self.bench.outcomes.open if self.deadline(s) <= self.bench.clock.now}
        self.bench.outcomes.may_abort |= expired
        stages = self.bench.limits.stages
        ready = [r for r in scheduler.running if r.uncomputed and r.message.seq not in expired]
        if stages > 1:  # out of turn, a request is planned at most one step after an unknown token
            ready = [r for r in ready if r.pending <= 1 or r.turn <= scheduler.num_steps]
        turns = {r.message.seq: r.turn if r.pending else 0 for r in ready if r.decodes}
        plan = self.bench.plan()
        assert expired.isdisjoint(self.bench.outcomes.open)
        if ready:
            assert plan is not None, "a request could have been computed"
            assert plan.work
            # If the budget has room for all next tokens, the first request in the policy's order is always planned.
            first = ready[0].message.seq
            if self.bench.limits.max_num_batched_tokens < self.bench.limits.max_num_seqs or first in spans(plan):
                return
            # With several stages it is left out only if it is not its turn or others have waited longer.
            assert stages > 1
            assert turns[first] > plan.step or len(turns) > 1

    def deadline(self, seq: int) -> float:
        deadline = self.bench.outcomes.specs[seq].deadline
        return float("inf") if deadline is None else deadline

    @rule()
    def land(self) -> None:
        self.bench.land()

    @precondition(lambda self: self.bench.outcomes.specs)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        last = len(self.bench.outcomes.specs)
        seqs = data.draw(st.lists(st.integers(0, last + 1), min_size=1, max_size=2))  # unknown ones too, and twice
        self.bench.abort(*seqs)
        assert set(seqs).isdisjoint(self.bench.outcomes.open)

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.bench.clock.now += seconds

    @invariant()
    def balanced(self) -> None:
        scheduler = self.bench.scheduler
        scheduler.audit()
        assert len(scheduler.running) <= self.bench.limits.max_num_seqs
        held = {block for r in scheduler.running for block in r.held_blocks}
        for r in scheduler.running:  # every full block is in the prefix cache
            assert r.blocks_cached == min(r.computed, len(r.tokens)) // self.bench.pool.block_size
        assert self.bench.pool.num_free == self.bench.pool.num_blocks - len(held)
        if self.bench.limits.window is not None:  # the tokens before wrong drafts are still there
            for r in scheduler.running:
                seen = max(r.computed - r.num_drafts - self.bench.limits.window + 1, 0)
                assert r.blocks_retired * self.bench.pool.block_size <= seen
        assert sorted(scheduler.unfinished) == self.bench.outcomes.open
        assert scheduler.num_waiting + scheduler.num_running == len(self.bench.outcomes.open)

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            self.bench.outcomes.may_abort |= {s for s in self.bench.outcomes.open if self.deadline(s) < float("inf")}
            # The first request in the policy's order is never preempted, so each request takes at most all its tokens.
            count = len(self.bench.outcomes.open)
            self.bench.drain(10 + self.depth + (count + 1) ** 2 * MAX_MODEL_LEN)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(steady, max_examples=150, stateful_step_count=50)


def test_requests_with_the_same_stop_tokens_share_one_set() -> None:
    """A list of 300,000 is not searched for each token, nor decoded again for each output."""
    data = encode_tokens(range(300_000))
    assert isinstance(token_set(data), frozenset)
    assert token_set(data) is token_set(bytes(bytearray(data)))
