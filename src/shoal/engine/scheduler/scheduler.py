"""Iteration-level scheduling (Orca; Yu et al., OSDI 2022), which decides the work of each step.

There is no prefill phase and no decode phase. A step has a token budget: running requests use it first, and chunks of
waiting prompts get the rest. Plans are made before the tokens of earlier plans are known, so a request may be planned
once or twice after its end; these results are dropped.

A pipeline of S stages works on S steps at a time. The first stage waits if a step needs a token that the last stage has
not drawn yet, and any stage waits if a step takes longer than the next. Therefore:

- A request whose token is drawn in step n is in step n + S at the earliest. There are two exceptions: the token is
  known before, or a step would be empty without the request (then the stages have nothing else to do, and the plan is
  ready when the token is).
- A step takes one in S of the requests that need single tokens (the first steps of each S take the remainder). It takes
  those that have waited longest, and among these the first by the policy. If the budget is too small even for those,
  the policy alone decides, as it does about blocks.
- New requests are admitted with chunks as `prompt_chunking` cuts them, but no more requests than their share of the
  draws.

The chunks of one prompt follow each other in consecutive steps, since a chunk needs only keys and values that its stage
has computed before. A pipeline of one stage needs none of these rules.
"""

from collections.abc import Callable, Iterable, Sequence

from shoal.engine.blocks import BlockPool
from shoal.engine.request import Request, RequestState
from shoal.engine.scheduler.admission import Admission
from shoal.engine.scheduler.block_tables import BlockTables
from shoal.engine.scheduler.intake import Intake
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.scheduler.plan_builder import PlanBuilder
from shoal.engine.scheduler.planning import RunningPlanner
from shoal.engine.scheduler.prompt_chunking import PromptChunker
from shoal.engine.scheduler.request_table import Counters, RequestTable
from shoal.engine.scheduler.results import Results, end_of_output
from shoal.engine.scheduler.verdicts import Verdicts
from shoal.engine.scheduler.waiting_queue import Deadlines, WaitingQueue
from shoal.engine.speculation import Drafter
from shoal.errors import EngineError
from shoal.protocols import Grammars, Policy
from shoal.wire.engine import EngineRequest, Finish, RefusalKind, ResetOutcome, SeqUpdate
from shoal.wire.grammars import Verdict
from shoal.wire.ranks import StepPlan, StepResult


class Scheduler:
    """Decides what each step computes, and keeps requests from their arrival to their end."""

    def __init__(
        self,
        pool: BlockPool,
        limits: SchedulerLimits,
        policy: Policy,
        clock: Callable[[], float],
        *,
        prefix_caching: bool = True,
        make_drafter: Callable[[], Drafter | None] = lambda: None,
        incarnation: int = 0,
        lockstep: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        """Make a scheduler without requests.

        Args:
            lockstep: all plans say that ranks of other replicas take part.
            grammars: follows outputs that must obey a grammar; None: requests with a grammar are refused.
        """
        self._limits = limits
        self._incarnation = incarnation
        self._lockstep = lockstep
        self._tables = BlockTables(pool, limits)
        self._requests = RequestTable(self._tables)
        self._queue = WaitingQueue()
        self._deadlines = Deadlines(clock)
        self._chunking = PromptChunker(limits.stages, limits.max_num_batched_tokens)
        self._intake = Intake(
            self._requests,
            limits,
            policy,
            clock,
            prefix_caching=prefix_caching,
            make_drafter=make_drafter,
            has_grammars=grammars is not None,
        )
        self._admission = Admission(
            self._requests, self._tables, self._queue, limits, self._chunking, clock, prefix_caching=prefix_caching
        )
        self._planner = RunningPlanner(self._requests, self._tables, self._queue, limits, self._chunking)
        self._verdicts = Verdicts(grammars, self._requests, self._queue)
        self._results = Results(self._requests, self._tables, self._queue, self._verdicts)
        self._flights: dict[int, tuple[Request, ...]] = {}  # step -> the requests that have work in it
        self._next_step = 0

    # --- what clients ask for ------------------------------------------------------------------------------------

    def add(self, message: EngineRequest) -> None:
        """Add a request. A request with a grammar enters the queue when its grammar is compiled.

        A request that another replica began continues after the output that it has. If its output is complete, it ends
        at once.

        Raises:
            RequestError: the request can never run.
        """
        request = self._intake.receive(message)
        finish = end_of_output(request) if request.num_output_tokens else None
        if finish is not None:
            self._results.update(SeqUpdate(message.seq, (), finish=finish))
            return
        self._requests.add(request)
        if request.constraint is None:
            self._queue.push(request)
        else:
            request.state = RequestState.CHECKED
            self._verdicts.follow(request)
        if message.deadline is not None:
            self._deadlines.add(message.deadline, message.seq)

    def abort(self, seqs: Iterable[int], error: str = "", refusal: RefusalKind = RefusalKind.NONE) -> None:
        """End requests. Requests that have ended already, or never existed, are ignored."""
        for seq in seqs:
            request = self._requests.find(seq)
            if request is not None:
                self._results.end(request, Finish.ABORT, error=error, refusal=refusal)

    def take_updates(self) -> list[SeqUpdate]:
        """Return the new updates for clients."""
        return self._results.take_updates()

    # --- steps ---------------------------------------------------------------------------------------------------

    def schedule(self, *, allow_empty: bool = False, only_empty: bool = False) -> StepPlan | None:
        """Return the next plan, or None if there is nothing to do before more results have come.

        Args:
            allow_empty: return a plan in any case.
            only_empty: put no work into the plan.
        """
        late = self._deadlines.pop_passed(self._requests.unfinished)
        self.abort(late, "the request's deadline has passed", RefusalKind.LATE)
        self._verdicts.foresee()
        plan = PlanBuilder(self._next_step, self._limits, self._chunking.share(self._backlog), self._tables)
        if not only_empty:
            self._fill(plan)
        if plan.has_work or allow_empty or (not only_empty and self._only_releases):
            return self._launch(plan)
        return None

    def _fill(self, plan: PlanBuilder) -> None:
        made_room = self._planner.continue_in_turn(plan)
        if not made_room:
            self._admission.admit(plan)
        if not plan.has_work:
            self._planner.continue_out_of_turn(plan)

    def _backlog(self) -> int:
        """Return how many tokens of prompts could be computed now."""
        return self._planner.backlog + self._admission.backlog

    @property
    def _only_releases(self) -> bool:
        """Return whether the ranks have nothing to do except to forget sequences."""
        return not self._flights and self._requests.has_released

    def _launch(self, plan: PlanBuilder) -> StepPlan:
        built = plan.build(
            incarnation=self._incarnation, released=self._requests.take_released(), lockstep=self._lockstep
        )
        self._chunking.note_step(plan.prompt_tokens)
        self._flights[built.step] = tuple(plan.requests)
        self._next_step += 1
        return built

    def apply(self, result: StepResult) -> None:
        """Take in the result of a step. Results come in the order of the plans.

        Raises:
            EngineError: the result is of another step than the expected one.
        """
        expected = next(iter(self._flights), None)
        if result.step != expected:  # without this check tokens would go to the wrong positions
            raise EngineError(f"the ranks answered step {result.step} instead of step {expected}")
        self._verdicts.note_step(result.times.forward_us)
        requests = self._flights.pop(result.step)
        for request in requests:
            request.in_flight -= 1
        for out in result.out:
            self._results.accept(out)
        for request in requests:
            if request.state is RequestState.DRAINING:
                self._queue.push_if_drained(request)

    # --- the cache -----------------------------------------------------------------------------------------------

    def reset_cache(self, *, running: bool) -> ResetOutcome:
        """Empty the prefix cache.

        `running`: also preempt the running requests, which then compute their tokens again.
        """
        if running:
            self._planner.preempt_all()
        return self._tables.forget_prefixes()

    def forget_cache(self) -> None:
        """Forget everything about the KV cache, whose memory is about to be freed. No step may be in flight.

        Raises:
            EngineError: a step is in flight.
        """
        if self._flights:
            raise EngineError(f"the KV cache can't be freed while {len(self._flights)} steps are in flight")
        self.reset_cache(running=True)
        self._requests.take_released()

    def start_anew(self, incarnation: int) -> None:
        """Forget the steps in flight and the KV cache, because ranks were replaced and all have forgotten everything.

        Requests keep the tokens that are known, and draw those that were in flight again.

        Args:
            incarnation: the one of all plans from now on.
        """
        self._incarnation = incarnation
        lost = self.in_flight
        self._flights.clear()
        for request in lost:
            request.in_flight = 0
        for request in self._requests.all:
            request.pending = request.num_drafts = 0
        self.forget_cache()
        for request in lost:
            self._queue.push_if_drained(request)

    # --- grammars ------------------------------------------------------------------------------------------------

    def apply_verdict(self, verdict: Verdict) -> None:
        """Take in the verdict of a grammar on an output."""
        self._results.apply_verdict(verdict)

    def awaits_verdicts(self, plan: StepPlan) -> bool:
        """Return whether masks of the plan are still unknown."""
        return self._verdicts.are_awaited(plan)

    def masks(self, plan: StepPlan, row_bytes: int) -> bytes:
        """Return the masks of the masked works of a plan, in their order.

        A request whose verdict is late is set back: its token of this step is dropped and drawn again later.
        """
        return self._verdicts.masks(plan, row_bytes)

    # --- counts and audits ---------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        return self._requests.counters

    @property
    def unfinished(self) -> list[int]:
        """The numbers of the requests that have not ended."""
        return list(self._requests.unfinished)

    @property
    def running(self) -> Sequence[Request]:
        """The running requests, in the policy's order."""
        return self._requests.running

    @property
    def num_running(self) -> int:
        return len(self._requests.running)

    @property
    def num_waiting(self) -> int:
        return self._requests.num_waiting

    @property
    def num_in_flight(self) -> int:
        return len(self._flights)

    @property
    def in_flight(self) -> list[Request]:
        """The requests that have work in steps in flight, each once. Some of them may have ended."""
        return list(dict.fromkeys(request for requests in self._flights.values() for request in requests))

    @property
    def num_steps(self) -> int:
        """Steps planned so far."""
        return self._next_step

    @property
    def idle(self) -> bool:
        """Return whether there is no request, nothing to release and no step in flight."""
        return self._requests.is_empty and not self._flights

    @property
    def has_updates(self) -> bool:
        return self._results.has_updates

    def audit(self) -> None:
        """Compare the lists of requests with their states, and block tables with the pool.

        Raises:
            EngineError: a block or a request was lost.
        """
        self._requests.audit()
