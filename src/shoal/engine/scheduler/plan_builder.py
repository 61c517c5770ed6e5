"""A step plan while it is made."""

import math
from collections.abc import Collection

from shoal.engine.request import Request
from shoal.engine.scheduler.block_tables import BlockTables
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.wire.base import Ids
from shoal.wire.ranks import NewSeq, StepPlan, Work


class PlanBuilder:
    """The work that was planned for a step so far, and the rest of its budgets.

    `budget`: tokens that still fit. `prompt_share`: how many of them are for prompts. `draws`: tokens that the step
    draws.
    """

    def __init__(self, step: int, limits: SchedulerLimits, prompt_share: int, tables: BlockTables) -> None:
        self.budget = limits.max_num_batched_tokens
        self.prompt_share = self._whole_prompt_share = prompt_share
        self.draws = 0
        self._prompt_logprobs: float = math.inf if limits.prompt_logprobs is None else limits.prompt_logprobs
        self.step = step
        self._next_turn = step + limits.stages
        self._tables = tables
        self._work: dict[Request, Work] = {}
        self._new: list[NewSeq] = []

    @property
    def requests(self) -> Collection[Request]:
        """The requests that have work in this step."""
        return self._work.keys()

    @property
    def has_work(self) -> bool:
        return bool(self._work)

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens that were planned of prompts."""
        return self._whole_prompt_share - self.prompt_share

    def fit(self, request: Request, start: int, count: int) -> int:
        """Return how many of a request's `count` tokens from `start` on fit into the step.

        At least one fits, even if the step already gives the most log-probabilities of prompts. Otherwise the request
        would delay those after it in the queue.
        """
        count = min(count, self.budget)
        most = max(self._prompt_logprobs, 1)
        return int(most) if request.prompt_logprobs_in(start, count) > most else count

    def introduce(self, new: NewSeq) -> None:
        """Add a request that starts to run, so that the ranks learn of it."""
        self._new.append(new)

    def give(self, request: Request, count: int, drafts: Ids = ()) -> None:
        """Plan the next `count` tokens of a request and the drafts after them, with the blocks that they need."""
        start = request.computed
        sample = start + count == request.length
        count += len(drafts)
        request.computed += count
        lookahead = request.drafter.lookahead if sample and request.drafter is not None else 0
        blocks = self._tables.extend(request, lookahead)
        request.num_drafts = len(drafts)
        request.in_flight += 1
        if sample:
            request.pending += 1
            request.turn = self._next_turn
        masked = sample and request.constraint is not None
        work = Work(request.message.seq, start, count, sample, tuple(blocks), drafts, masked)
        self._work[request] = work
        self._count(request, work, 1)

    def give_token(self, request: Request) -> None:
        """Plan the next token of a plain request that has no other and needs no block: a short form of `give`."""
        start = request.computed
        self._work[request] = Work(request.message.seq, start, 1, True)
        request.computed = start + 1
        request.in_flight += 1
        request.pending += 1
        request.turn = self._next_turn
        self.budget -= 1
        self.draws += 1

    def take_back(self, request: Request) -> None:
        """Undo `give`, if the request has work in this step. The caller frees its blocks."""
        work = self._work.pop(request, None)
        if work is None:
            return
        request.pending -= work.sample
        request.in_flight -= 1
        request.num_drafts = 0
        self._count(request, work, -1)

    def build(self, *, incarnation: int, released: Ids, lockstep: bool) -> StepPlan:
        return StepPlan(
            incarnation=incarnation,
            step=self.step,
            work=tuple(self._work.values()),
            new=tuple(self._new),
            released=released,
            lockstep=lockstep,
        )

    def _count(self, request: Request, work: Work, times: int) -> None:
        self._prompt_logprobs -= times * request.prompt_logprobs_in(work.start, work.count)
        self.budget -= times * work.count
        self.prompt_share -= times * _prompt_tokens(work)
        self.draws += times * work.sample


def _prompt_tokens(work: Work) -> int:
    """Return how much of the step's share for prompts a work uses: nothing if it is a single token with drafts."""
    return work.count if work.count - len(work.drafts) > 1 else 0
