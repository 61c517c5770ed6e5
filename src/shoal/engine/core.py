"""The engine, which turns requests into step plans, keeps the ranks busy and gives out their tokens."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NoReturn

from shoal.activity import AWAKE, KV_CACHE, Activity
from shoal.engine.blocks import BlockPool
from shoal.engine.engine_stats import RankCounts, StepCounts, describe_engine
from shoal.engine.engine_trace import EngineTrace
from shoal.engine.rank_deaths import RankDeaths, describe_replacement
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.scheduler.scheduler import Scheduler
from shoal.engine.scheduler.waiting_queue import PriorityPolicy
from shoal.engine.speculation import Drafter
from shoal.errors import CheckpointError, ClosedError, EngineError, RankFailed, RanksDied
from shoal.log import get_logger
from shoal.protocols import Executor, Grammars, Lockstep, Policy
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest, EngineStats, ResetOutcome, SeqUpdate
from shoal.wire.ranks import StepMask, StepPlan, StepResult, decode_rank_stats
from shoal.wire.trace import TraceEvents

log = get_logger("engine")

_STATS_TIMEOUT_S = 30.0
_AUDIT_EVERY_S = 5.0
_REST_SLICE_S = 0.5
_DROP_SLICE_S = 0.5
_MASK_WORD_BYTES = 4
_GRAMMAR_SLICE_S = 0.01  # short, because the engine sees no new requests while it waits for verdicts
_MASK_TIMEOUT_S = 0.025  # how long ranks wait for late verdicts


class EngineCore:
    """The engine itself. It has the interface `EngineClient`, and runs while its owner calls `updates`.

    At most `max_in_flight` plans are with the ranks at a time. If this is one more than the number of stages, the next
    plan has arrived when the first stage ends a step, so the ranks never wait for the engine.

    When ranks die and the executor can replace them, the engine goes on: requests keep their tokens, and no plan is
    made until the ranks are replaced (`reforming`). Each replacement is a new incarnation.

    A replica in lockstep launches steps without work if other replicas need them, and its ranks form their groups anew
    if those of another replica do. While it is not `busy`, its owner waits for the lockstep (see
    `LockstepMember.fileno`); no method of this class does.
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
        replica: int = 0,
        on_close: Callable[[EngineError | None], object] = lambda _: None,
    ) -> None:
        """Make the engine of ranks that have started.

        Args:
            incarnation: marks this engine's messages; results with another number are dropped.
            grammars: follows outputs that must obey a grammar; None: requests with a grammar are refused.
            lockstep: if given, the engine launches as many steps as the other replicas do.
            memory_timeout: seconds that ranks have to free memory, or to allocate it again.
            replica: the number of this engine among the replicas, for traces.
            on_close: is called once, when the engine is closed, with its failure if it has failed.
        """
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
        self._steps_before = 0  # steps of earlier incarnations
        self._activity = AWAKE
        self._missing: tuple[str, ...] = ()  # parts of memory that the ranks do not have, once all calls are done
        self._memory_timeout = memory_timeout
        self._on_close = on_close
        self._clock = clock
        self._next_audit = float("-inf")
        self._max_in_flight = max_in_flight
        self._failure: EngineError | None = None
        self._closed = False
        self._schedule_ns = 0
        self._counts = StepCounts()
        self._deaths = RankDeaths(clock)
        self._ranks = RankCounts()
        self._trouble = ""  # why ranks were replaced the last time
        self._replica = replica
        self._trace: EngineTrace | None = None  # not None: a trace is recorded

    def add(self, request: EngineRequest) -> None:
        self._check_open()
        self._scheduler.add(request)

    def abort(self, seqs: Sequence[int]) -> None:
        self._scheduler.abort(seqs)

    def drop(self) -> None:
        """End all requests and the trace, and discard their updates.

        Raises:
            EngineError: the engine has failed.
        """
        self._scheduler.abort(self._scheduler.unfinished)
        while self.busy:
            self.updates(_DROP_SLICE_S)
        self.end_trace()

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._check_open()
        self._run_once(timeout)
        self._audit_when_idle()
        return self._scheduler.take_updates()

    def _run_once(self, timeout: float) -> None:
        """Launch plans as long as there is work, then take in the results that arrive within `timeout` seconds.

        Raises:
            EngineError: the engine has failed.
        """
        try:
            self._take_verdicts(0)
            if self._executor.reforming:
                self._executor.poll(timeout)
                return
            if self._lockstep is not None and not self._scheduler.num_in_flight:
                self._executor.poll(0)  # raises an error if ranks have died, here or in another replica
            self._launch()
            if not self._scheduler.num_in_flight:
                self._take_verdicts(min(timeout, _GRAMMAR_SLICE_S))
            else:
                for result in self._executor.poll(timeout):
                    if result.incarnation == self._incarnation:
                        self._apply(result)
        except RanksDied as error:
            self._replace_ranks(error)
        except EngineError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - the plan may have reached only some ranks: their state is unknown
            self._fail(EngineError(f"{type(error).__name__}: {error}"), error)

    def _fail(self, error: EngineError, cause: Exception | None = None) -> NoReturn:
        """Fail for good, with this error or with that of another replica from which it follows."""
        self._failure = self._root_cause(error)
        self._executor.fail(str(self._failure))
        if self._failure is error:
            raise error from cause
        raise self._failure from error

    def _audit_when_idle(self) -> None:
        """Audit the scheduler now and then. An audit looks at every block: milliseconds in a large cache."""
        if self._scheduler.idle and self._clock() >= self._next_audit:
            self._scheduler.audit()
            self._next_audit = self._clock() + _AUDIT_EVERY_S

    @property
    def busy(self) -> bool:
        """Return whether `updates` has work to do or something to return."""
        scheduler = self._scheduler
        at_work = not scheduler.idle if self._activity.runs else scheduler.num_in_flight > 0
        try:
            if self._lockstep is not None:
                self._lockstep.check()
            return at_work or scheduler.has_updates or self._executor.reforming or self._is_behind
        except EngineError:  # `updates` acts on it
            return True

    @property
    def _is_behind(self) -> bool:
        """Return whether other replicas have launched steps that this replica has not launched yet."""
        return self._lockstep is not None and self._lockstep.steps_due() > self._steps_launched

    @property
    def _steps_launched(self) -> int:
        """Return the number of steps launched in this incarnation."""
        return self._scheduler.num_steps - self._steps_before

    def _root_cause(self, error: EngineError) -> EngineError:
        """Return the error to report. If another replica has failed, `error` follows from that failure."""
        try:
            _ = self._is_behind
        except EngineError as theirs:
            return theirs
        return error

    def _launch(self) -> None:
        behind = self._is_behind  # needed even if no plan may be launched: it raises if another replica has failed
        while self._scheduler.num_in_flight < self._max_in_flight:
            begun = time.monotonic_ns()
            plan = self._scheduler.schedule(allow_empty=behind, only_empty=not self._activity.runs)
            if plan is not None:
                if self._trace is not None:
                    self._trace.scheduled(plan, begun)
                self._launch_plan(plan)
            self._schedule_ns += time.monotonic_ns() - begun
            if plan is None:
                return
            behind = self._is_behind

    def _launch_plan(self, plan: StepPlan) -> None:
        begun = time.monotonic_ns()
        self._executor.launch(plan)
        self._counts.note_plan(plan)
        if self._lockstep is not None:
            self._lockstep.launched(self._steps_launched)
        self._send_mask(plan)
        if self._trace is not None:
            self._trace.launched(plan, begun)

    def _take_verdicts(self, timeout: float) -> None:
        """Take in verdicts. Wait up to `timeout` seconds if one is expected."""
        if self._grammars is not None and self._grammars.pending:
            for verdict in self._grammars.poll(timeout):
                self._scheduler.apply_verdict(verdict)

    def _send_mask(self, plan: StepPlan) -> None:
        """Send the mask of a masked plan while the ranks compute the step."""
        if not plan.masked or self._grammars is None:
            return
        deadline = self._clock() + _MASK_TIMEOUT_S
        while self._scheduler.awaits_verdicts(plan) and (left := deadline - self._clock()) > 0:
            self._take_verdicts(left)
        words = self._grammars.words
        bits = self._scheduler.masks(plan, words * _MASK_WORD_BYTES)
        self._executor.mask(StepMask(plan.incarnation, plan.step, bits, words))

    def _apply(self, result: StepResult) -> None:
        begun = time.monotonic_ns()
        self._scheduler.apply(result)
        self._schedule_ns += time.monotonic_ns() - begun
        if self._trace is not None:
            self._trace.applied(result, begun)
        self._counts.note_result(result)
        self._deaths.note_work()

    # --- ranks that die ------------------------------------------------------------------------------------------

    @property
    def reforming(self) -> bool:
        """Return whether ranks are being replaced. The ranks answer nothing meanwhile."""
        return self._executor.reforming

    def _replace_ranks(self, error: RanksDied) -> None:
        """Begin to replace ranks that have died, or to form the groups anew because ranks of another replica have.

        Raises:
            RankFailed: they are not replaced, because a request may be the cause or because it has not helped before.
        """
        if why_not := self._deaths.note_death(self._scheduler.in_flight, here=bool(error.ranks)):
            self._fail(RankFailed(f"{error}; {why_not}"), error)
        self._trouble = describe_replacement(error)
        log.warning("%s", self._trouble)
        if self._trace is not None:
            self._trace.note_replacement(self._trouble)
        try:
            self._incarnation = self._begin_incarnation(error)
            self._scheduler.start_anew(self._incarnation)
            self._steps_before = self._scheduler.num_steps
            self._executor.reform(self._incarnation, self._missing)
        except EngineError as another:
            self._fail(another)
        self._ranks.note_replacement(error.ranks)

    def _begin_incarnation(self, error: RanksDied) -> int:
        if self._lockstep is None:
            return self._incarnation + 1
        return self._lockstep.begin_reform(str(error) if error.ranks else "", awake=not self._missing)

    def _finish_reform(self) -> None:
        """Wait until ranks that are being replaced can compute."""
        while self._executor.reforming:
            self._run_once(_REST_SLICE_S)

    # --- pauses and sleep ----------------------------------------------------------------------------------------

    @property
    def activity(self) -> Activity:
        return self._activity

    def set_activity(self, activity: Activity) -> None:
        """Pause, resume, free memory or allocate it again, as the change to `activity` needs.

        When this returns, no step is in flight unless the engine runs. Requests keep their tokens; those whose KV
        blocks were freed compute their tokens again.

        Raises:
            CheckpointError: the weights can't be read again; the engine is as before.
            EngineError: the engine has failed.
        """
        self._check_open()
        before = self._activity
        if not activity.runs:
            self._activity = before.pause()
            self._finish_steps_in_flight()
        if lost := [part for part in activity.missing if part not in before.missing]:
            if KV_CACHE in lost:
                self._scheduler.forget_cache()
            self._call_ranks("sleep", lost, missing=(*before.missing, *lost))
        if back := [part for part in before.missing if part not in activity.missing]:
            self._wake_up(back, before, activity)
        self._activity = activity

    def _finish_steps_in_flight(self) -> None:
        """Wait until the steps in flight end, and take part in steps that other replicas have launched."""
        while self._scheduler.num_in_flight or self._executor.reforming:
            self._run_once(_REST_SLICE_S)

    def _wake_up(self, parts: Sequence[str], before: Activity, activity: Activity) -> None:
        refusals = self._call_ranks("wake_up", parts, activity.missing)
        if any(refusals):
            self._call_ranks("sleep", parts, before.missing)
            raise CheckpointError("; ".join(dict.fromkeys(why for why in refusals if why)))

    def _call_ranks(self, verb: str, parts: Sequence[str], missing: tuple[str, ...]) -> list[str]:
        """Have the ranks free or allocate parts of their memory, and return their refusals ("": none).

        Ranks that die are replaced. All ranks then have all parts but those that are `missing` after the call.
        """
        self._finish_reform()
        self._missing = missing
        try:
            answers = self._executor.call(verb, ",".join(parts).encode(), timeout=self._memory_timeout)
        except RanksDied as error:
            self._replace_ranks(error)
            self._finish_reform()
            return []
        except EngineError as error:
            self._fail(error)
        return [answer.decode() for answer in answers]

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        """Empty the prefix cache. `running`: also preempt the running requests, so that they free their blocks."""
        self._check_open()
        return self._scheduler.reset_cache(running=running)

    def stats(self) -> EngineStats:
        """Return statistics of the engine and its ranks. The ranks answer when the steps launched so far have ended.

        While ranks are being replaced, the statistics of ranks are those that they gave last.
        """
        self._check_open()
        if answers := self._ask_ranks("stats"):
            self._ranks.note([decode_rank_stats(answer) for answer in answers])
        return self.snapshot()

    def _ask_ranks(self, verb: str, payload: bytes = b"") -> list[bytes]:
        """Have all ranks answer a question, and return the answers; none if ranks are being replaced."""
        if self._executor.reforming:
            return []
        try:
            return self._executor.call(verb, payload, timeout=_STATS_TIMEOUT_S)
        except RanksDied as error:
            self._replace_ranks(error)
            return []

    def check(self) -> None:
        """Check the ranks while the engine is idle. If some have died, their replacement begins, and `busy` is True.

        Raises:
            EngineError: a rank has failed.
        """
        self._check_open()
        try:
            self._executor.poll(0)
        except RanksDied as error:
            self._replace_ranks(error)
        except EngineError as error:
            self._fail(error)

    def snapshot(self) -> EngineStats:
        """Return statistics of the engine, with those that the ranks gave last. Sends nothing to the ranks."""
        return replace_fields(
            describe_engine(self._scheduler, self._pool, self._counts, self._ranks),
            max_model_len=self._limits.max_model_len,
            schedule_us=self._schedule_ns // 1000,
            start_s=tuple(self._executor.start_times.items()),
            activity=self._activity,
            trouble=self._trouble if self._executor.reforming else "",
        )

    # --- traces --------------------------------------------------------------------------------------------------

    def begin_trace(self, limit: int) -> None:
        self._check_open()
        self._trace = EngineTrace(self._ask_ranks, self._replica, limit)

    def take_trace(self) -> list[TraceEvents]:
        return [] if self._trace is None else self._trace.take(ask=self._is_open and not self.reforming)

    def end_trace(self, *, ask: bool = True) -> list[TraceEvents]:
        """End the recording, as `TracedClient` says. `ask`: False if the ranks are not to be asked any more."""
        trace, self._trace = self._trace, None
        return [] if trace is None else [trace.end(ask=ask and self._is_open)]

    def close(self) -> None:
        first, self._closed = not self._closed, True
        self._executor.close()
        if self._grammars is not None:
            self._grammars.close()
        if first:
            self._on_close(self._failure)

    @property
    def _is_open(self) -> bool:
        return self._failure is None and not self._closed

    def _check_open(self) -> None:
        if self._failure is not None:
            raise ClosedError(f"the engine has failed: {self._failure}")
        if self._closed:
            raise ClosedError("the engine was closed")
