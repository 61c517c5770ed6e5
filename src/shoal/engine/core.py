"""The engine: turns requests into plans, keeps the ranks busy, and hands out what they bring."""

import time
from collections.abc import Callable, Sequence

from shoal import wire
from shoal.engine.blocks import BlockPool
from shoal.engine.grammar import Grammar, Grammars
from shoal.engine.scheduler import Limits, PriorityPolicy, Scheduler
from shoal.engine.speculation import Guesser
from shoal.errors import ClosedError, EngineError, RequestError
from shoal.protocols import Executor, Policy

_STATS_TIMEOUT_S = 30.0
_AUDIT_EVERY_S = 5.0


class EngineCore:
    """An EngineClient in this process: `updates` drives it.

    `max_in_flight` plans are with the ranks at a time. With two, the next step is there when the ranks have ended
    the one before, and the engine's own work takes none of their time.
    """

    def __init__(
        self,
        executor: Executor,
        limits: Limits,
        *,
        block_size: int,
        prefix_caching: bool,
        max_in_flight: int,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        incarnation: int = 0,
        grammars: Grammars | None = None,
        make_guesser: Callable[[], Guesser | None] = lambda: None,
    ) -> None:
        """`incarnation` marks this engine's messages: what answers another one's is dropped. Without `grammars`
        requests that bring one are refused."""
        self._executor = executor
        self._limits = limits
        self._pool = BlockPool(executor.num_blocks, block_size)
        self._incarnation = incarnation
        self._grammars = grammars
        self._scheduler = Scheduler(
            self._pool,
            limits,
            policy or PriorityPolicy(),
            clock,
            prefix_caching=prefix_caching,
            make_guesser=make_guesser,
            incarnation=incarnation,
        )
        self._clock = clock
        self._next_audit = float("-inf")
        self._max_in_flight = max_in_flight
        self._failure: EngineError | None = None
        self._closed = False
        self._steps = 0
        self._schedule_ns = 0
        self._step_total_us = 0
        self._step_forward_us = 0

    def add(self, request: wire.EngineRequest) -> None:
        self._check_open()
        self._scheduler.add(request, self._compile(request.grammar) if request.grammar else None)

    def _compile(self, grammar: str) -> Grammar:
        if self._grammars is None:
            raise RequestError("structured outputs need a tokenizer, which this model does not have")
        return self._grammars.compile(grammar)

    def abort(self, seqs: Sequence[int]) -> None:
        self._scheduler.abort(seqs)

    def updates(self, timeout: float) -> list[wire.SeqUpdate]:
        self._check_open()
        try:
            self._launch()
            if self._scheduler.num_in_flight:
                for result in self._executor.poll(timeout):
                    if result.incarnation == self._incarnation:
                        self._apply(result)
        except EngineError as error:
            self._failure = error
            raise
        except Exception as error:  # a plan may have left half-way: nobody knows what the ranks wait for
            self._failure = EngineError(f"{type(error).__name__}: {error}")
            raise self._failure from error
        self._audit_when_idle()
        return self._scheduler.take_updates()

    def _audit_when_idle(self) -> None:
        """Every block is looked at, which takes milliseconds in a large cache: now and then will do."""
        if self._scheduler.idle and self._clock() >= self._next_audit:
            self._scheduler.audit()
            self._next_audit = self._clock() + _AUDIT_EVERY_S

    @property
    def busy(self) -> bool:
        """Is there anything that `updates` would work on or hand out?"""
        return not self._scheduler.idle or self._scheduler.has_updates

    def _launch(self) -> None:
        while self._scheduler.num_in_flight < self._max_in_flight:
            begun = time.perf_counter_ns()
            plan = self._scheduler.schedule()
            if plan is not None:
                self._executor.launch(plan)
                self._mask(plan)
            self._schedule_ns += time.perf_counter_ns() - begun
            if plan is None:
                return

    def _mask(self, plan: wire.StepPlan) -> None:
        """Behind a plan that is masked, and while the ranks compute it."""
        if plan.masked and self._grammars is not None:
            bits = self._scheduler.masks(plan)
            self._executor.mask(wire.StepMask(plan.incarnation, plan.step, bits, self._grammars.words))

    def _apply(self, result: wire.StepResult) -> None:
        begun = time.perf_counter_ns()
        self._scheduler.apply(result)
        self._schedule_ns += time.perf_counter_ns() - begun
        self._steps += 1
        self._step_total_us += result.times.total_us
        self._step_forward_us += result.times.forward_us

    def stats(self) -> wire.EngineStats:
        """Asks the ranks too, once the steps launched so far have ended."""
        self._check_open()
        ranks = self._executor.call("stats", timeout=_STATS_TIMEOUT_S)
        counters = self._scheduler.counters
        return wire.EngineStats(
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
            ranks=tuple(wire.decode_stats(answer) for answer in ranks),
        )

    def close(self) -> None:
        self._closed = True
        self._executor.close()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise ClosedError(f"the engine has failed: {self._failure}")
        if self._closed:
            raise ClosedError("the engine was closed")
