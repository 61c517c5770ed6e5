"""Planning the next tokens of running requests, and preemption if blocks run out."""

from collections.abc import Callable, Container

from shoal.engine.request import Request, RequestState
from shoal.engine.scheduler.block_tables import BlockTables
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.scheduler.plan_builder import PlanBuilder
from shoal.engine.scheduler.prompt_chunking import PromptChunker
from shoal.engine.scheduler.request_table import RequestTable
from shoal.engine.scheduler.waiting_queue import WaitingQueue
from shoal.wire.base import Ids


class RunningPlanner:
    """Plans the next tokens of running requests.

    Requests that need a single token take turns over the stages of a pipeline. `PromptChunker` decides the chunks of
    prompts. If no block is free for a request, the running request that is last in the policy's order is preempted.
    """

    def __init__(
        self,
        requests: RequestTable,
        tables: BlockTables,
        queue: WaitingQueue,
        limits: SchedulerLimits,
        chunking: PromptChunker,
    ) -> None:
        self._requests = requests
        self._tables = tables
        self._queue = queue
        self._limits = limits
        self._chunking = chunking

    @property
    def backlog(self) -> int:
        """The number of tokens of running prompts that could be computed now."""
        return sum(request.uncomputed for request in self._requests.running if not request.decodes)

    def continue_in_turn(self, plan: PlanBuilder) -> bool:
        """Plan the next tokens of running requests. Return True if a request was preempted."""
        if self._limits.stages == 1:
            return self._continue(plan, None)
        return self._continue(
            plan, self._longest_waiting(plan, lambda each: not each.pending or each.turn <= plan.step)
        )

    def continue_out_of_turn(self, plan: PlanBuilder) -> None:
        """Plan a token of requests whose last token is planned but not known, before it is their turn."""
        self._continue(plan, self._longest_waiting(plan, lambda each: each.pending == 1 and each.turn > plan.step))

    def preempt(self, request: Request, plan: PlanBuilder | None = None) -> None:
        """Free a request's blocks. It computes its tokens again, once those in flight are known.

        Work that the unfinished `plan` has for it is removed.
        """
        if plan is not None:
            plan.take_back(request)
        self._requests.counters.preemptions += 1
        request.preemptions += 1
        self._requests.stop(request)
        request.computed = 0
        request.state = RequestState.DRAINING
        self._queue.push_if_drained(request)

    def preempt_all(self) -> None:
        for request in list(self._requests.running):
            self.preempt(request)

    def _continue(self, plan: PlanBuilder, turn: Container[Request] | None) -> bool:
        """Plan the next tokens of running requests, and single tokens only for requests in `turn`; None: for all.

        Single tokens are planned first, so that the chunks of a long prompt do not delay them. Most of them need no
        block, no draft and no mask: with many running requests these are nearly all of the scheduler's work.
        """
        made_room, size, windows = False, self._tables.block_size, self._tables.has_window
        chunks: list[Request] = []
        filled: list[Request] = []  # requests of which a block may have become full
        for request in list(self._requests.running):
            if request.state is not RequestState.RUNNING:  # it was preempted for another
                continue
            if windows:
                self._tables.retire(request)
            uncomputed = request.uncomputed
            if uncomputed > 1:
                chunks.append(request)
            elif uncomputed and (turn is None or request in turn):
                if request.plain and request.computed % size and plan.budget:
                    plan.give_token(request)
                    if not request.computed % size:
                        filled.append(request)
                else:
                    made_room |= self._plan(request, 1, plan)
                    filled.append(request)
        for request in chunks:
            if request.state is RequestState.RUNNING:
                made_room |= self._plan(request, self._chunking.cut(request.uncomputed, plan.prompt_share), plan)
                filled.append(request)
        # Not before all is planned: a request that is taken back must not leave blocks in the cache that no step fills.
        for request in filled:
            self._tables.cache(request)
        return made_room

    def _plan(self, request: Request, wanted: int, plan: PlanBuilder) -> bool:
        """Plan up to `wanted` tokens of a request. Return True if a request was preempted for them."""
        made_room = False
        wanted = plan.fit(request, request.computed, wanted)
        if wanted == 0:
            return False
        while request.state is RequestState.RUNNING and self._tables.room(request) == 0:
            self.preempt(self._requests.running[-1], plan)
            made_room = True
        if request.state is RequestState.RUNNING:
            count = min(wanted, self._tables.room(request))
            plan.give(request, count, self._drafts(request, count, plan))
        return made_room

    def _drafts(self, request: Request, count: int, plan: PlanBuilder) -> Ids:
        """Return the drafts that are computed after the last known token of a request.

        There are as many as budget and blocks allow, but none after a chunk in the middle of a prompt and none after
        the last token that the request may have.
        """
        if request.drafter is None or count != 1 or request.uncomputed != 1:
            return ()
        if request.constraint is not None and not request.constraint.drafts:
            return ()
        room = self._tables.room_for_drafts(request)
        most = min(plan.budget, room, request.message.max_tokens - request.num_output_tokens) - 1
        if most <= 0:
            return ()
        return request.drafter.propose(most) if request.constraint is None else request.constraint.drafts[:most]

    def _longest_waiting(self, plan: PlanBuilder, may: Callable[[Request], bool]) -> set[Request]:
        """Return the requests that get a single token in this step: one in `stages` of those that decode.

        They are the ones that have waited longest among those that `may` be planned.
        """
        decoding = [request for request in self._requests.running if request.decodes]
        ready = [request for request in decoding if request.uncomputed and may(request)]
        stages = self._limits.stages
        if len(decoding) > stages * self._limits.max_num_batched_tokens:
            return set(ready)
        share = max((len(decoding) + stages - 1 - plan.step % stages) // stages, 1)
        return set(sorted(ready, key=lambda request: request.turn)[:share])
