"""The stream of the outputs of one request of an `AsyncLLM`."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from shoal.errors import EngineError, Overdue, QueueFull, ShoalError, Unavailable
from shoal.llm.deltas import Delta
from shoal.llm.outputs import PromptOutputs
from shoal.outputs import Logprobs, RequestOutput
from shoal.wire.engine import RefusalKind, SeqUpdate

_RETRY_S = {  # seconds after which a client should try again, by the kind of the error
    RefusalKind.FULL: 1.0,
    RefusalKind.LATE: 5.0,
    RefusalKind.CLOSING: 10.0,
    RefusalKind.LOST: 10.0,
    RefusalKind.ASLEEP: 10.0,
}


class RunningRequests(Protocol):
    """The part of `AsyncLLM` that a stream needs to end its requests in the fleet."""

    def release(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        """End requests in the fleet, and ignore their later updates.

        Args:
            stopped: True if their outputs are complete because they have reached a stop text.
        """

    def end(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        """End requests in the fleet. Their last updates are still delivered."""


class RequestStream:
    """The stream of the outputs of one request.

    Iterating over it gives lists of deltas, one for each output that has grown; deltas that nobody reads are merged. If
    the iteration stops before the end, or its task is cancelled, the request is ended in the fleet. A stream that is
    not iterated must be awaited with `wait` or closed.
    """

    def __init__(self, requests: RunningRequests, outputs: PromptOutputs, seqs: Sequence[int]) -> None:
        self.job = outputs.job
        self.seqs = list(seqs)
        self._requests = requests
        self._outputs = outputs
        self._running = set(seqs)
        self._changed: dict[int, bool] = {}  # outputs that have grown -> whether they have ended
        self._error: ShoalError | None = None
        self._wakeup = asyncio.Event()

    @property
    def number(self) -> int:
        """The number of the first output's request."""
        return self.seqs[0]

    @property
    def cached_tokens(self) -> int:
        """The number of prompt tokens that the prefix cache had, known from the first deltas on."""
        return self._outputs.cached_tokens

    @property
    def prompt_logprobs(self) -> Sequence[Logprobs | None] | None:
        """The log-probabilities of the prompt's tokens, converted to `Logprob` objects only when they are read.

        That of the first token is None. The whole is None if they were not asked for.
        """
        return self._outputs.lazy_prompt_logprobs()

    @property
    def prompt_complete(self) -> bool:
        """True if all log-probabilities of the prompt that were asked for are known."""
        return self._outputs.prompt_complete

    async def __aiter__(self) -> AsyncIterator[Sequence[Delta]]:
        try:
            while self._running or self._changed:
                if self._changed:
                    changed, self._changed = self._changed, {}
                    completions = self._outputs.completions
                    yield [completions[index].delta(last=last) for index, last in sorted(changed.items())]
                else:
                    await self._await_update()
            if self._error is not None:
                raise self._error
        finally:
            self.close()

    async def wait(self) -> RequestOutput:
        """Wait for the end, and return all outputs.

        Their log-probabilities are converted to `Logprob` objects only when they are read.

        Raises:
            RequestError, Unavailable, EngineError: the request ended with an error (see `AsyncLLM.generate`).
        """
        try:
            while self._running:
                await self._await_update()
        finally:
            self.close()
        if self._error is not None:
            raise self._error
        return self._output(None, lazy=True)

    async def _await_update(self) -> None:
        self._wakeup.clear()
        await self._wakeup.wait()

    def output(self, request_id: str | None = None) -> RequestOutput:
        """Return all outputs so far.

        An unfinished output has no `finish_reason`, and omits text at its end that may be the beginning of a stop text.
        """
        return self._output(request_id, lazy=False)

    def _output(self, request_id: str | None, *, lazy: bool) -> RequestOutput:
        outputs = [
            completion.output(ended=seq not in self._running, lazy=lazy)
            for seq, completion in zip(self.seqs, self._outputs.completions, strict=True)
        ]
        prompt = self.prompt_logprobs
        return RequestOutput(
            request_id=f"request-{self.number}" if request_id is None else request_id,
            prompt=self.job.prompt,
            prompt_token_ids=self.job.tokens,
            outputs=tuple(outputs),
            num_cached_tokens=self.cached_tokens,
            error=None if self._error is None else str(self._error),
            finished=not self._running and self._error is None,
            prompt_logprobs=prompt if lazy or prompt is None else tuple(prompt),
        )

    def abort(self) -> None:
        """End the request. Its outputs keep what they have, and finish with the reason "abort"."""
        self._requests.end(list(self._running))

    def close(self) -> None:
        """End the request in the fleet, if it has not ended. Idempotent."""
        if self._running:
            self._requests.release(list(self._running))
            self._running.clear()
            self._wakeup.set()

    def fail(self, error: ShoalError) -> None:
        """End the request with an error, for its reader and in the fleet."""
        self._error = error
        self.close()
        self._wakeup.set()

    def take(self, seq: int, update: SeqUpdate) -> None:
        """Add an update of the request that has the number `seq` here, and wake the reader."""
        if seq not in self._running:
            return
        index = seq - self.number
        stopped = self._outputs.take(index, update)
        if stopped and update.finish is None:
            self._requests.release((seq,), stopped=True)
        ended = stopped or update.finish is not None
        if ended:
            self._running.discard(seq)
            self._outputs.running -= 1
        if update.error:
            self._error = _error_of(update)
            self.close()  # the other outputs are not needed any more
        elif ended or update.tokens:
            self._changed[index] = ended
        self._wakeup.set()


def _error_of(update: SeqUpdate) -> ShoalError:
    match update.refusal:
        case RefusalKind.INVALID:
            return update.request_error()
        case RefusalKind.FULL:
            return QueueFull(update.error, _RETRY_S[update.refusal])
        case RefusalKind.LATE:
            return Overdue(update.error, _RETRY_S[update.refusal])
        case RefusalKind.CLOSING | RefusalKind.LOST | RefusalKind.ASLEEP:
            return Unavailable(update.error, _RETRY_S[update.refusal])
        case _:
            return EngineError(update.error)
