"""Results of steps and verdicts of grammars, and the end of requests."""

from collections.abc import Sequence

from shoal.engine.request import Request, RequestState
from shoal.engine.scheduler.block_tables import BlockTables
from shoal.engine.scheduler.request_table import RequestTable
from shoal.engine.scheduler.verdicts import Verdicts
from shoal.engine.scheduler.waiting_queue import WaitingQueue
from shoal.errors import RequestError, structured_outputs_error
from shoal.wire.base import Ids
from shoal.wire.engine import Finish, RefusalKind, SeqUpdate, error_fields
from shoal.wire.grammars import Verdict
from shoal.wire.ranks import PromptLogprobs, SeqOut, TokenLogprobs


class Results:
    """Takes in results of ranks and verdicts of grammars, and keeps the updates for clients."""

    def __init__(self, requests: RequestTable, tables: BlockTables, queue: WaitingQueue, verdicts: Verdicts) -> None:
        self._requests = requests
        self._tables = tables
        self._queue = queue
        self._verdicts = verdicts
        self._updates: list[SeqUpdate] = []

    @property
    def has_updates(self) -> bool:
        return bool(self._updates)

    def take_updates(self) -> list[SeqUpdate]:
        updates, self._updates = self._updates, []
        return updates

    def update(self, update: SeqUpdate) -> None:
        self._updates.append(update)

    def accept(self, out: SeqOut) -> None:
        """Append drawn tokens to their request. Results of an older epoch are dropped."""
        request = self._requests.find(out.seq)
        if request is None or request.epoch != out.epoch:
            return
        if request.plain and not out.logprobs and len(out.tokens) == 1:
            self._accept_token(request, out.tokens)
            return
        if out.tokens:
            self._settle_drafts(request, len(out.tokens) - 1)
        if out.prompt_logprobs is not None:
            reported = out.prompt_logprobs.start + len(out.prompt_logprobs.entries) - 1
            request.prompt_reported = max(request.prompt_reported, reported)
        taken, finish, error = _append(request, out.tokens)
        if request.drafter is not None:
            request.drafter.accept(taken, out.drafts)
        self._requests.counters.generated_tokens += len(taken)
        self._tables.cache(request)
        logprobs = out.logprobs[: len(taken)]
        if finish is not None:
            self.end(request, finish, taken, logprobs, error or "", prompt_logprobs=out.prompt_logprobs)
            return
        if request.constraint is not None and taken:
            self._verdicts.ask(request, taken)
        self._updates.append(_update(request, taken, logprobs, out.prompt_logprobs))

    def _accept_token(self, request: Request, tokens: Ids) -> None:
        """Append the drawn token of a plain request: a short form of `accept`."""
        request.pending -= 1
        request.tokens.append(tokens[0])
        self._requests.counters.generated_tokens += 1
        if not len(request.tokens) % self._tables.block_size:  # a block may have become full
            self._tables.cache(request)
        finish = end_of_output(request)
        if finish is not None:
            self.end(request, finish, tokens)
        elif request.waited_s:
            self._updates.append(_update(request, tokens))
        else:
            self._updates.append(SeqUpdate(request.message.seq, tokens, (), None, request.cached_tokens))

    def apply_verdict(self, verdict: Verdict) -> None:
        """Take in the verdict of a grammar on an output."""
        request = self._verdicts.take(verdict)
        if request is None:
            return
        finish, error = _end_by(verdict, request)
        if finish is not None:
            self.end(request, finish, error=error or "")
        elif request.state is RequestState.CHECKED:
            self._queue.push(request)
        else:
            self._queue.push_if_drained(request)

    def end(
        self,
        request: Request,
        finish: Finish,
        tokens: Sequence[int] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        error: RequestError | str = "",
        refusal: RefusalKind = RefusalKind.NONE,
        prompt_logprobs: PromptLogprobs | None = None,
    ) -> None:
        """End a request, and give its client the last tokens.

        Args:
            error: a message, if the error is of another kind than INVALID.
            refusal: the kind of an error that is given as a message.
        """
        self._requests.remove(request)
        self._verdicts.forget(request)
        self._updates.append(
            SeqUpdate(
                request.message.seq,
                tuple(tokens),
                logprobs,
                finish,
                request.cached_tokens,
                prompt_logprobs=prompt_logprobs,
                waited_us=request.take_waited_us(),
                preemptions=request.preemptions,
                **error_fields(error, refusal),
            )
        )

    def _settle_drafts(self, request: Request, right: int) -> None:
        """Note that a planned token is known, and that `right` drafts before it were right.

        The positions after the right drafts must be computed again.
        """
        request.pending -= 1
        if request.num_drafts:
            self._requests.counters.count_drafts(request.num_drafts, right)
            if request.state is RequestState.RUNNING:
                request.computed -= request.num_drafts - right
            request.num_drafts = 0


def _update(
    request: Request,
    tokens: Ids,
    logprobs: tuple[TokenLogprobs, ...] = (),
    prompt_logprobs: PromptLogprobs | None = None,
) -> SeqUpdate:
    """Return the update of a request that goes on."""
    return SeqUpdate(
        seq=request.message.seq,
        tokens=tokens,
        logprobs=logprobs,
        cached_tokens=request.cached_tokens,
        prompt_logprobs=prompt_logprobs,
        waited_us=request.take_waited_us(),
    )


def _append(request: Request, drawn: Sequence[int]) -> tuple[tuple[int, ...], Finish | None, RequestError | None]:
    """Append drawn tokens up to the end of the output.

    Return the tokens that were appended, why the output ends after them (None if it does not), and the error if there
    is one.
    """
    constraint = request.constraint
    for place, token in enumerate(drawn):
        error = constraint.why_forbidden(place, token) if constraint is not None else None
        if error is not None:
            return tuple(drawn[:place]), Finish.ABORT, error
        request.tokens.append(token)
        finish = end_of_output(request)
        drafted = place + 1 < len(drawn)  # another token was drawn after this one, which was a right draft
        if finish is None and drafted and constraint is not None and constraint.is_complete_behind(place + 1):
            finish = Finish.STOP
        if finish is not None:
            return tuple(drawn[: place + 1]), finish, None
    return tuple(drawn), None, None


def end_of_output(request: Request) -> Finish | None:
    """Return why an output ends with its last token, as far as this is known without its grammar."""
    if request.tokens[-1] in request.stop_ids:
        return Finish.STOP
    if request.constraint is not None:  # the grammar may say that it is complete, which is STOP and not LENGTH
        return None
    return Finish.LENGTH if len(request.tokens) >= request.most_tokens else None


def _end_by(verdict: Verdict, request: Request) -> tuple[Finish | None, RequestError | None]:
    """Return why an output ends after a verdict (None if it does not), and the error if there is one."""
    full = request.num_output_tokens >= request.message.max_tokens
    if verdict.refusal is not None:
        return Finish.ABORT, verdict.refusal.error()
    if verdict.lost:
        times = request.constraint.losses if request.constraint is not None else 1
        return Finish.ABORT, structured_outputs_error(f": {verdict.lost}, {times} times")
    if verdict.problem and not full:
        return Finish.ABORT, structured_outputs_error(f"can't be obeyed: {verdict.problem}")
    if request.num_output_tokens and verdict.ended[0]:
        return Finish.STOP, None
    return (Finish.LENGTH if full else None), None
