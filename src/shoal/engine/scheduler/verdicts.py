"""Verdicts of grammars on outputs, and the masks of plans.

A verdict may take long, and other requests must not wait for it. A request is planned before its verdict has come only
if the verdict should arrive before the ranks need it. Otherwise it is planned when the verdict has come.
"""

from collections.abc import Sequence

from shoal.engine.request import Request, RequestState
from shoal.engine.scheduler.request_table import RequestTable
from shoal.engine.scheduler.waiting_queue import WaitingQueue
from shoal.protocols import Grammars
from shoal.wire.grammars import GrammarAsk, Verdict
from shoal.wire.ranks import StepPlan

_LEAST_FORESIGHT_US = 1000
_STEPS_REMEMBERED = 8


class Verdicts:
    """Requests verdicts on outputs that must obey a grammar, and makes the masks of plans from them."""

    def __init__(self, grammars: Grammars | None, requests: RequestTable, queue: WaitingQueue) -> None:
        """Make it for an engine with these `grammars`; None: no request has a grammar."""
        self._grammars = grammars
        self._requests = requests
        self._queue = queue
        self._awaited: dict[Request, None] = {}  # running requests whose verdict has not come; a set in order
        self._forward_us = 0.0  # moving average of the forward time of steps

    def follow(self, request: Request) -> None:
        """Have a grammar follow an output, starting with its tokens so far. The first verdict comes unrequested."""
        assert self._grammars is not None
        output = request.tokens[request.num_prompt_tokens :]
        self._grammars.follow(request.message.seq, request.message.grammar, tuple(output))

    def ask(self, request: Request, taken: Sequence[int]) -> None:
        """Request a verdict on the drawn tokens `taken`, and on drafts of the next ones."""
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
        """Store a verdict in its request and return the request, or None if the verdict is of no use."""
        request = self._requests.find(verdict.seq)
        if request is None or request.constraint is None:
            return None
        constraint = request.constraint
        if verdict.lost and constraint.note_loss():
            self.follow(request)
            return None
        # The output was followed again and has new tokens since, so this verdict is about an older position.
        if not verdict.lost and verdict.refusal is None and verdict.num_tokens != request.num_output_tokens:
            return None
        self._awaited.pop(request, None)
        constraint.verdict, constraint.cost_us = verdict, verdict.cost_us
        return request

    def foresee(self) -> None:
        """Mark the requests whose verdicts should arrive before the ranks have computed a step, so they are planned."""
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
        """Return the masks of the masked works of a plan, in their order.

        A request whose verdict is late is set back: its token of this step is dropped and drawn again later.
        """
        found = []
        for work in plan.work:
            if not work.masked:
                continue
            places = 1 + len(work.drafts)
            late = self._unjudged(work.seq)
            request = self._requests.find(work.seq)
            if late is not None:
                self._set_back(late)
            if late is not None or request is None or request.constraint is None:  # its token will be dropped
                found.append(b"\xff" * row_bytes * places)
            else:
                found.append(request.constraint.masks(places))
        return b"".join(found)

    def _unjudged(self, seq: int) -> Request | None:
        request = self._requests.find(seq)
        waits = request is not None and request.constraint is not None and request.constraint.verdict is None
        return request if waits else None

    def _set_back(self, request: Request) -> None:
        """Have a request draw the token of the last plan again."""
        assert request.constraint is not None
        request.constraint.cost_us = max(request.constraint.cost_us, 2 * int(self._forward_us) + _LEAST_FORESIGHT_US)
        self._requests.stop(request)
        request.computed = request.pending = request.num_drafts = 0
        request.epoch += 1  # so that results in flight are dropped
        request.state = RequestState.DRAINING
        self._queue.push_if_drained(request)
