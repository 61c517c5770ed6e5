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
        if self._limits.stages == 1:  # all requests; to find those whose turn it is would take as long as planning
            return self._continue(plan, set(self._requests.running))
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

    def _continue(self, plan: PlanBuilder, turn: Container[Request]) -> bool:
        """Plan the next tokens of running requests, and single tokens only for requests in `turn`.

        Single tokens are planned first, so that the chunks of a long prompt do not delay them.
        """
        made_room = False
        wanting = [(request, request.uncomputed) for request in self._requests.running]
        for request, uncomputed in sorted(wanting, key=lambda each: each[1] > 1):
            if request.state is not RequestState.RUNNING:  # it was preempted for another
                continue
            self._tables.retire(request)
            wanted = self._wanted(request, uncomputed, plan, turn)
            if wanted == 0:
                continue
            while request.state is RequestState.RUNNING and self._tables.room(request) == 0:
                self.preempt(self._requests.running[-1], plan)
                made_room = True
            if request.state is RequestState.RUNNING:
                count = min(wanted, self._tables.room(request))
                plan.give(request, count, self._drafts(request, count, plan))
        # Not before all is planned: a request that is taken back must not leave blocks in the cache that no step fills.
        for request in plan.requests:
            self._tables.cache(request)
        return made_room

    def _wanted(self, request: Request, uncomputed: int, plan: PlanBuilder, turn: Container[Request]) -> int:
        if uncomputed > 1:
            uncomputed = self._chunking.cut(uncomputed, plan.prompt_share)
        elif request not in turn:
            return 0
        return plan.fit(request, request.computed, uncomputed)

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
