"""Verdicts of grammars on outputs, and the masks of plans.

A verdict may take long, and then nobody else waits for it. A request is planned ahead of its verdict only where that
is there before the ranks need it; others are planned when it has come.
"""

from collections.abc import Sequence

from shoal.engine.request import Request, RequestState
from shoal.engine.scheduler.books import Books
from shoal.engine.scheduler.waiting_queue import WaitingQueue
from shoal.protocols import Grammars
from shoal.wire.grammars import GrammarAsk, Verdict
from shoal.wire.ranks import StepPlan

_LEAST_FORESIGHT_US = 1000
_STEPS_REMEMBERED = 8


class Verdicts:
    """Asks for verdicts on outputs that must obey a grammar, and makes the masks of plans from them."""

    def __init__(self, grammars: Grammars | None, books: Books, queue: WaitingQueue) -> None:
        """`grammars` may be None where no request has one."""
        self._grammars = grammars
        self._books = books
        self._queue = queue
        self._awaited: dict[Request, None] = {}  # running, and their verdicts are on their way
        self._forward_us = 0.0  # what ranks take for a step, of late

    def follow(self, request: Request) -> None:
        """Have a grammar follow an output from its tokens so far on. A first verdict comes without asking."""
        assert self._grammars is not None
        output = request.tokens[request.num_prompt_tokens :]
        self._grammars.follow(request.message.seq, request.message.grammar, tuple(output))

    def ask(self, request: Request, taken: Sequence[int]) -> None:
        """Have the grammar look at what was drawn, and at drafts of what follows."""
        assert self._grammars is not None
        assert request.constraint is not None
        most = request.message.max_tokens - request.num_output_tokens - 1
        drafts = request.drafter.propose(most) if request.drafter is not None and most > 0 else ()
        request.constraint.verdict, request.constraint.foreseen = None, False
        self._awaited[request] = None
        self._grammars.ask([GrammarAsk(request.message.seq, tuple(taken), drafts, masked=not request.complete)])

    def forget(self, request: Request) -> None:
        """Stop following an output, if a grammar follows it."""
        if request.constraint is not None and self._grammars is not None:
            self._awaited.pop(request, None)
            self._grammars.forget((request.message.seq,))

    def take(self, verdict: Verdict) -> Request | None:
        """Note a verdict; return the request that goes on by it, None if there is none."""
        request = self._books.find(verdict.seq)
        if request is None or request.constraint is None:
            return None
        constraint = request.constraint
        if verdict.lost and constraint.note_loss():
            self.follow(request)
            return None
        # Of an output that was followed anew, and has got tokens since, it says nothing.
        if not verdict.lost and verdict.refusal is None and verdict.num_tokens != request.num_output_tokens:
            return None
        self._awaited.pop(request, None)
        constraint.verdict, constraint.cost_us = verdict, verdict.cost_us
        return request

    def foresee(self) -> None:
        """Let requests be planned whose verdicts will be there before the ranks have computed a step."""
        if not self._awaited:
            return
        left = max(self._forward_us, _LEAST_FORESIGHT_US)
        constraints = [(each.constraint, each.drafter is None) for each in self._awaited if each.constraint]
        for constraint, plain in sorted(constraints, key=lambda each: each[0].cost_us):
            left -= constraint.cost_us
            constraint.foreseen = plain and left >= 0

    def note_step(self, forward_us: int) -> None:
        self._forward_us += (forward_us - self._forward_us) / _STEPS_REMEMBERED

    def are_awaited(self, plan: StepPlan) -> bool:
        """Return whether masks of the plan are still unknown."""
        return any(work.masked and self._unjudged(work.seq) is not None for work in plan.work)

    def masks(self, plan: StepPlan, row_bytes: int) -> bytes:
        """Return which tokens may be drawn in the masked works of a plan, in their order.

        A request whose verdict has not come yet is set back: what is drawn for it counts for nothing.
        """
        found = []
        for work in plan.work:
            if not work.masked:
                continue
            places = 1 + len(work.drafts)
            late = self._unjudged(work.seq)
            request = self._books.find(work.seq)
            if late is not None:
                self._set_back(late)
            if late is not None or request is None or request.constraint is None:  # it has ended, or draws for nothing
                found.append(b"\xff" * row_bytes * places)
            else:
                found.append(request.constraint.masks(places))
        return b"".join(found)

    def _unjudged(self, seq: int) -> Request | None:
        request = self._books.find(seq)
        waits = request is not None and request.constraint is not None and request.constraint.verdict is None
        return request if waits else None

    def _set_back(self, request: Request) -> None:
        """Have a request draw again what it draws in the plan that was made last."""
        assert request.constraint is not None
        request.constraint.cost_us = max(request.constraint.cost_us, 2 * int(self._forward_us) + _LEAST_FORESIGHT_US)
        self._books.stop(request)
        request.computed = request.pending = request.num_drafts = 0
        request.epoch += 1  # results in flight are of no use
        request.state = RequestState.DRAINING
        self._queue.push_if_drained(request)
