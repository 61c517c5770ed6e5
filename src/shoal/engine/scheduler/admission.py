"""Admission of waiting requests."""

from collections.abc import Callable

from shoal.engine.request import Request
from shoal.engine.scheduler.block_tables import BlockTables
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.scheduler.plan_builder import PlanBuilder
from shoal.engine.scheduler.prompt_chunking import PromptChunker
from shoal.engine.scheduler.request_table import RequestTable
from shoal.engine.scheduler.waiting_queue import WaitingQueue
from shoal.wire.ranks import NewSeq

# The most tokens of requests that are admitted in a step. A lookup in the prefix cache and the message to the ranks
# take some 0.1 us for each token: hundreds of long cached prompts would delay the next token of all other requests.
_MAX_ADMITTED_TOKENS = 1 << 18


class Admission:
    """Admits waiting requests in the order of the queue. No request overtakes a prompt that waits for room."""

    def __init__(
        self,
        requests: RequestTable,
        tables: BlockTables,
        queue: WaitingQueue,
        limits: SchedulerLimits,
        chunking: PromptChunker,
        clock: Callable[[], float],
        *,
        prefix_caching: bool,
    ) -> None:
        self._requests = requests
        self._tables = tables
        self._queue = queue
        self._limits = limits
        self._chunking = chunking
        self._clock = clock
        self._prefix_caching = prefix_caching

    @property
    def backlog(self) -> int:
        """The number of prompt tokens of waiting requests for which there are places and blocks.

        An estimate: part of them may be in the prefix cache.
        """
        return min(self._queue.tokens_of_first(self._places), self._tables.free_tokens)

    @property
    def _places(self) -> int:
        return self._limits.max_num_seqs - len(self._requests.running)

    def admit(self, plan: PlanBuilder) -> None:
        """Admit the requests that fit into the step, and plan the first tokens of each."""
        running = self._requests.running
        waiting = min(self._places, len(self._queue))
        most_draws = -(-(len(running) + waiting) // self._limits.stages)
        admitted_tokens = 0
        while plan.budget > 0 and plan.draws < most_draws and len(running) < self._limits.max_num_seqs:
            request = self._queue.first()
            if request is None or admitted_tokens >= _MAX_ADMITTED_TOKENS or not self._start(request, plan):
                return
            admitted_tokens += len(request.tokens)

    def _start(self, request: Request, plan: PlanBuilder) -> bool:
        """Start the first request of the queue. Return False if the step or the cache has no room for it.

        The whole prompt must have room, though blocks are allocated chunk by chunk. A prompt that was admitted without
        room for its end would be the first to be preempted.
        """
        prefix = self._tables.find_prefix(request)
        if not self._tables.fits(request, prefix):
            return False
        # If all tokens are cached, the last one is computed again to draw the token after it. No rank writes it.
        computed = min(self._tables.tokens_in(prefix), len(request.tokens) - 1)
        left = len(request.tokens) - computed
        count = plan.fit(request, computed, self._chunking.cut(left, plan.prompt_share) if left > 1 else left)
        if count == 0:
            return False
        self._queue.pop()
        self._requests.start(request, prefix)
        request.computed = computed
        self._count(request)
        plan.introduce(_introduction(request, prefix))
        self._tables.retire(request)
        plan.give(request, count)
        self._tables.cache(request)
        return True

    def _count(self, request: Request) -> None:
        counters = self._requests.counters
        if self._prefix_caching:
            counters.prefix_queries += len(request.tokens)
            counters.prefix_hits += request.computed
        if request.epoch == 0:
            request.waited_s = self._clock() - request.added
            request.cached_tokens = min(request.computed, request.num_prompt_tokens)
            counters.prompt_tokens += request.num_prompt_tokens


def _introduction(request: Request, prefix: list[int]) -> NewSeq:
    return NewSeq(
        seq=request.message.seq,
        epoch=request.epoch,
        tokens=request.encoded_tokens(),
        num_prompt_tokens=request.num_prompt_tokens,
        blocks=tuple(prefix),
        sampling=request.message.sampling,
    )
