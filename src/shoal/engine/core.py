"""The engine: it turns requests into plans, keeps the ranks busy, and gives out what they bring."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from shoal.activity import AWAKE, KV_CACHE, Activity
from shoal.engine.blocks import BlockPool
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.scheduler.scheduler import Scheduler
from shoal.engine.scheduler.waiting_queue import PriorityPolicy
from shoal.engine.speculation import Drafter
from shoal.errors import CheckpointError, ClosedError, EngineError
from shoal.protocols import Executor, Grammars, Lockstep, Policy
from shoal.wire.engine import EngineRequest, EngineStats, ResetOutcome, SeqUpdate
from shoal.wire.ranks import RankStats, StepMask, StepPlan, StepResult, decode_rank_stats

_STATS_TIMEOUT_S = 30.0
_AUDIT_EVERY_S = 5.0
_REST_SLICE_S = 0.5
_DROP_SLICE_S = 0.5
_WORD = 4  # bytes of a mask's word
_GRAMMAR_SLICE_S = 0.01  # new requests are not seen while verdicts are waited for
_MASK_PATIENCE_S = 0.025  # of ranks that wait for a mask which should have been there
_MOST_DOUBLINGS = 24  # of tokens in a step, from 1 on


class EngineCore:
    """An EngineClient in this process: `updates` drives it.

    Up to `max_in_flight` plans are with the ranks at a time. With one more than there are stages, the next plan is
    there when the first stage has ended a step, and the engine's own work takes none of the ranks' time.

    Replicas in lockstep launch steps without work because the others need them. The lockstep wakes whoever waits while
    an engine is not `busy`: nothing here waits for it.
    """

    def __init__(
        self,
        executor: Executor,
        limits: SchedulerLimits,
        *,
        block_size: int,
        prefix_caching: bool,
        max_in_flight: int,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        incarnation: int = 0,
        grammars: Grammars | None = None,
        make_drafter: Callable[[], Drafter | None] = lambda: None,
        lockstep: Lockstep | None = None,
        memory_timeout: float = 600.0,
    ) -> None:
        """`incarnation` marks this engine's messages: answers to another one's are dropped. Without `grammars`
        requests that bring one are refused. With `lockstep` as many steps are launched as by the other replicas.
        `memory_timeout`: seconds that ranks have to give memory back, or to take it again."""
        self._executor = executor
        self._limits = limits
        self._pool = BlockPool(executor.num_blocks, block_size)
        self._incarnation = incarnation
        self._grammars = grammars
        self._scheduler = Scheduler(
            self._pool,
            replace(limits, stages=min(limits.stages, max_in_flight)),  # no more batches than plans
            policy or PriorityPolicy(),
            clock,
            prefix_caching=prefix_caching,
            make_drafter=make_drafter,
            incarnation=incarnation,
            lockstep=lockstep is not None,
            grammars=grammars,
        )
        self._lockstep = lockstep
        self._activity = AWAKE
        self._memory_timeout = memory_timeout
        self._clock = clock
        self._next_audit = float("-inf")
        self._max_in_flight = max_in_flight
        self._failure: EngineError | None = None
        self._closed = False
        self._steps = 0
        self._schedule_ns = 0
        self._step_total_us = 0
        self._step_forward_us = 0
        self._ranks: tuple[RankStats, ...] = ()  # their last answers
        self._iteration_tokens = [0] * _MOST_DOUBLINGS
        self._step_tokens = 0

    def add(self, request: EngineRequest) -> None:
        self._check_open()
        self._scheduler.add(request)

    def abort(self, seqs: Sequence[int]) -> None:
        self._scheduler.abort(seqs)

    def drop(self) -> None:
        """End all requests without telling anybody.

        Raises:
            EngineError: it has failed.
        """
        self._scheduler.abort(self._scheduler.unfinished)
        while self.busy:
            self.updates(_DROP_SLICE_S)

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._check_open()
        self._turn(timeout)
        self._audit_when_idle()
        return self._scheduler.take_updates()

    def _turn(self, timeout: float) -> None:
        """Launch plans as long as there is work, and take in results that come within `timeout` seconds.

        Raises:
            EngineError: the engine has failed.
        """
        try:
            self._judge(0)
            self._launch()
            if not self._scheduler.num_in_flight:
                self._judge(min(timeout, _GRAMMAR_SLICE_S))
            else:
                for result in self._executor.poll(timeout):
                    if result.incarnation == self._incarnation:
                        self._apply(result)
        except EngineError as error:
            self._failure = self._cause(error)
            if self._failure is error:
                raise
            raise self._failure from error
        except Exception as error:  # a plan may have reached some ranks only: nobody knows what they wait for
            self._failure = EngineError(f"{type(error).__name__}: {error}")
            raise self._failure from error

    def _audit_when_idle(self) -> None:
        """Audit now and then only: every block is looked at, which takes milliseconds in a large cache."""
        if self._scheduler.idle and self._clock() >= self._next_audit:
            self._scheduler.audit()
            self._next_audit = self._clock() + _AUDIT_EVERY_S

    @property
    def busy(self) -> bool:
        """Return whether there is anything that `updates` would work on or give out."""
        scheduler = self._scheduler
        at_work = not scheduler.idle if self._activity.runs else scheduler.num_in_flight > 0
        try:
            return at_work or scheduler.has_updates or self._behind
        except EngineError:  # `updates` raises it too
            return True

    @property
    def _behind(self) -> bool:
        """Return whether other replicas have launched steps that this one has not."""
        return self._lockstep is not None and self._lockstep.steps_due() > self._scheduler.num_steps

    def _cause(self, error: EngineError) -> EngineError:
        """Return the error to report: that of another replica if one has failed, since this one follows from it."""
        try:
            _ = self._behind
        except EngineError as theirs:
            return theirs
        return error

    def _launch(self) -> None:
        behind = self._behind  # asked even if no plan may leave: it raises if another replica has failed
        while self._scheduler.num_in_flight < self._max_in_flight:
            begun = time.perf_counter_ns()
            plan = self._scheduler.schedule(must=behind, rest=not self._activity.runs)
            if plan is not None:
                self._executor.launch(plan)
                self._count(plan)
                if self._lockstep is not None:
                    self._lockstep.launched(self._scheduler.num_steps)
                self._mask(plan)
            self._schedule_ns += time.perf_counter_ns() - begun
            if plan is None:
                return
            behind = self._behind

    def _count(self, plan: StepPlan) -> None:
        tokens = sum(work.count for work in plan.work)
        if tokens:
            self._iteration_tokens[min((tokens - 1).bit_length(), _MOST_DOUBLINGS - 1)] += 1
            self._step_tokens += tokens

    def _judge(self, timeout: float) -> None:
        """Take in verdicts, waiting up to `timeout` seconds if one is on its way."""
        if self._grammars is not None and self._grammars.pending:
            for verdict in self._grammars.poll(timeout):
                self._scheduler.judge(verdict)

    def _mask(self, plan: StepPlan) -> None:
        """Send the mask of a masked plan, while the ranks compute it."""
        if not plan.masked or self._grammars is None:
            return
        deadline = self._clock() + _MASK_PATIENCE_S
        while self._scheduler.awaits_verdicts(plan) and (left := deadline - self._clock()) > 0:
            self._judge(left)
        words = self._grammars.words
        bits = self._scheduler.masks(plan, words * _WORD)
        self._executor.mask(StepMask(plan.incarnation, plan.step, bits, words))

    def _apply(self, result: StepResult) -> None:
        begun = time.perf_counter_ns()
        self._scheduler.apply(result)
        self._schedule_ns += time.perf_counter_ns() - begun
        self._steps += 1
        self._step_total_us += result.times.total_us
        self._step_forward_us += result.times.forward_us

    # --- pauses and sleep ----------------------------------------------------------------------------------------

    @property
    def activity(self) -> Activity:
        return self._activity

    def become(self, activity: Activity) -> None:
        """Pause, go on, give memory back or take it again: whatever leads from the present activity to `activity`.

        When this returns nothing is in flight, unless the engine runs. Requests keep what they have; those whose KV
        blocks are given back compute their tokens again.

        Raises:
            CheckpointError: the weights can't be read again; the engine is as before.
            EngineError: it has failed.
        """
        self._check_open()
        before = self._activity
        if not activity.runs:
            self._activity = before.pause()
            self._rest()
        if lost := [part for part in activity.missing if part not in before.missing]:
            if KV_CACHE in lost:
                self._scheduler.forget_cache()
            self._call_ranks("sleep", lost)
        if back := [part for part in before.missing if part not in activity.missing]:
            self._take_back(back)
        self._activity = activity

    def _rest(self) -> None:
        """Let the steps in flight end, and take part in those that other replicas have launched."""
        while self._scheduler.num_in_flight:
            self._turn(_REST_SLICE_S)

    def _take_back(self, parts: Sequence[str]) -> None:
        refusals = self._call_ranks("wake_up", parts)
        if any(refusals):
            self._call_ranks("sleep", parts)
            raise CheckpointError("; ".join(dict.fromkeys(why for why in refusals if why)))

    def _call_ranks(self, verb: str, parts: Sequence[str]) -> list[str]:
        try:
            answers = self._executor.call(verb, ",".join(parts).encode(), timeout=self._memory_timeout)
        except EngineError as error:
            self._failure = error
            raise
        return [answer.decode() for answer in answers]

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        """Make no block findable by its prefix any more. `running`: running requests give theirs back, too."""
        self._check_open()
        return self._scheduler.reset_cache(running=running)

    def stats(self) -> EngineStats:
        """Return numbers of the engine and of its ranks, which are asked once the steps launched so far have ended."""
        self._check_open()
        ranks = self._executor.call("stats", timeout=_STATS_TIMEOUT_S)
        self._ranks = tuple(decode_rank_stats(answer) for answer in ranks)
        return self.snapshot()

    def check(self) -> None:
        """Check the ranks while there is nothing to do.

        Raises:
            EngineError: one has failed.
        """
        self._check_open()
        try:
            self._executor.poll(0)
        except EngineError as error:
            self._failure = self._cause(error)
            if self._failure is error:
                raise
            raise self._failure from error

    def snapshot(self) -> EngineStats:
        """Return the engine's own numbers and the last ones of its ranks, without asking them."""
        counters = self._scheduler.counters
        return EngineStats(
            waiting=self._scheduler.num_waiting,
            running=self._scheduler.num_running,
            num_blocks=self._pool.num_blocks,
            free_blocks=self._pool.num_free,
            block_size=self._pool.block_size,
            max_model_len=self._limits.max_model_len,
            steps=self._steps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            draft_tokens=counters.draft_tokens,
            accepted_tokens=counters.accepted_tokens,
            schedule_us=self._schedule_ns // 1000,
            step_total_us=self._step_total_us,
            step_forward_us=self._step_forward_us,
            start_s=tuple(self._executor.start_times.items()),
            ranks=self._ranks,
            iteration_tokens=tuple(self._iteration_tokens),
            step_tokens=self._step_tokens,
            drafts=counters.drafts,
            accepted_by_position=tuple(counters.accepted_by_position),
            activity=self._activity,
        )

    def close(self) -> None:
        self._closed = True
        self._executor.close()
        if self._grammars is not None:
            self._grammars.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise ClosedError(f"the engine has failed: {self._failure}")
        if self._closed:
            raise ClosedError("the engine was closed")
