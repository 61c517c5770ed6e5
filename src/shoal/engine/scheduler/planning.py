"""Planning the next tokens of running requests, and preempting some where blocks run out."""

from collections.abc import Callable, Container

from shoal.engine.prompt_chunking import PromptChunker
from shoal.engine.request import Request, RequestState
from shoal.engine.scheduler.block_tables import BlockTables
from shoal.engine.scheduler.books import Books
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.scheduler.plan_builder import PlanBuilder
from shoal.engine.scheduler.waiting_queue import WaitingQueue
from shoal.wire.base import Ids


class RunningPlanner:
    """Plans the next tokens of running requests.

    Requests that need a single token take turns over the stages of a pipeline; a prompt gets chunks as the chunking
    says. Where a request finds no block, the one that is last in the policy's order gives its own back.
    """

    def __init__(
        self, books: Books, tables: BlockTables, queue: WaitingQueue, limits: SchedulerLimits, chunking: PromptChunker
    ) -> None:
        self._books = books
        self._tables = tables
        self._queue = queue
        self._limits = limits
        self._chunking = chunking

    @property
    def backlog(self) -> int:
        """Tokens of running prompts that could be computed now."""
        return sum(request.uncomputed for request in self._books.running if not request.decodes)

    def continue_in_turn(self, plan: PlanBuilder) -> bool:
        """Give running requests their next tokens; True if one had to make room for another."""
        if self._limits.stages == 1:  # whoever wants a token; to look at all of them takes as long as to plan
            return self._continue(plan, set(self._books.running))
        return self._continue(
            plan, self._longest_waiting(plan, lambda each: not each.pending or each.turn <= plan.step)
        )

    def continue_out_of_turn(self, plan: PlanBuilder) -> None:
        """Give tokens to requests that are no more than one step behind a token that is not known."""
        self._continue(plan, self._longest_waiting(plan, lambda each: each.pending == 1 and each.turn > plan.step))

    def preempt(self, request: Request, plan: PlanBuilder | None = None) -> None:
        """Give a request's blocks back; it will compute its tokens again, once those in flight are known.

        Work that the unfinished `plan` gives it is taken back.
        """
        if plan is not None:
            plan.take_back(request)
        self._books.counters.preemptions += 1
        request.preemptions += 1
        self._books.stop(request)
        request.computed = 0
        request.state = RequestState.DRAINING
        self._queue.push_if_drained(request)

    def preempt_all(self) -> None:
        for request in list(self._books.running):
            self.preempt(request)

    def _continue(self, plan: PlanBuilder, turn: Container[Request]) -> bool:
        """Give running requests their next tokens, single ones to those whose `turn` it is.

        Those that need a single token come first: a long prompt in chunks delays nobody's next token.
        """
        made_room = False
        wanting = [(request, request.uncomputed) for request in self._books.running]
        for request, uncomputed in sorted(wanting, key=lambda each: each[1] > 1):
            if request.state is not RequestState.RUNNING:  # it has made room for another
                continue
            self._tables.retire(request)
            wanted = self._wanted(request, uncomputed, plan, turn)
            if wanted == 0:  # it waits for results
                continue
            while request.state is RequestState.RUNNING and self._tables.room(request) == 0:
                self.preempt(self._books.running[-1], plan)
                made_room = True
            if request.state is RequestState.RUNNING:
                count = min(wanted, self._tables.room(request))
                plan.give(request, count, self._drafts(request, count, plan))
        # Only now: had the prefix cache been told before, a request taken back would have left promises in it.
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
        """Return the drafts that are computed behind the last known token of a request.

        There are as many as budget and blocks allow, and none behind a part of a prompt or behind the last token that
        is wanted.
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
        """Return those that get a single token in this step: one in `stages` of the requests that decode."""
        decoding = [request for request in self._books.running if request.decodes]
        ready = [request for request in decoding if request.uncomputed and may(request)]
        stages = self._limits.stages
        if len(decoding) > stages * self._limits.max_num_batched_tokens:
            return set(ready)
        share = max((len(decoding) + stages - 1 - plan.step % stages) // stages, 1)
        return set(sorted(ready, key=lambda request: request.turn)[:share])
