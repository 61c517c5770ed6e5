"""The requests of a replica set that have not ended, and the updates for their clients."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal.errors import RequestError
from shoal.protocols import Recorder
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest, Finish, RefusalKind, SeqUpdate, error_fields
from shoal.wire.ranks import PromptLogprobs
from shoal.wire.tokens import encode_tokens, num_tokens

_SAME_PLACE = 16  # tokens: a request that draws at least so many between two deaths has made progress


@dataclass(slots=True)
class OpenRequest:
    """A request that has not ended, with what its client has received."""

    request: EngineRequest
    output: bytearray = field(default_factory=bytearray)  # the tokens that its replicas have drawn (`wire.tokens`)
    prompt_reported: int = 0  # the first so many tokens of the prompt have their log-probabilities reported
    cached_tokens: int | None = None  # tokens of the prompt that the prefix cache of its first replica had
    aborted: bool = False
    deaths: int = 0  # replicas that died while they had it, without progress in between
    died_at: int = 0  # the number of its output tokens at the last death
    moved: bool = False  # True: a replica had it and has it no more

    def continuation(self) -> EngineRequest:
        """Return the request to send to another replica, which continues after the tokens so far.

        Log-probabilities of the prompt are computed again only if they are not complete. Those that the client has are
        left out of the updates.
        """
        request = self.request
        sampling = request.sampling
        if self.prompt_reported >= request.num_prompt_tokens:
            sampling = replace_fields(sampling, prompt_logprobs=-1)
        return replace_fields(request, tokens=request.tokens + bytes(self.output), sampling=sampling)

    def take(self, update: SeqUpdate) -> SeqUpdate:
        """Note a replica's update, and return it without what the client has already."""
        self.output += encode_tokens(update.tokens)
        if self.cached_tokens is None:
            self.cached_tokens = update.cached_tokens
        if update.prompt_logprobs is None and update.cached_tokens == self.cached_tokens:
            return update
        return replace_fields(
            update, cached_tokens=self.cached_tokens, prompt_logprobs=self._unreported(update.prompt_logprobs)
        )

    def note_death(self) -> None:
        """Note that the replica that had it has died."""
        length = num_tokens(self.output)
        self.deaths = self.deaths + 1 if length - self.died_at < _SAME_PLACE else 1
        self.died_at = length

    def _unreported(self, logprobs: PromptLogprobs | None) -> PromptLogprobs | None:
        if logprobs is None:
            return None
        start = max(logprobs.start, self.prompt_reported)
        entries = logprobs.entries[start - logprobs.start :]
        self.prompt_reported = start + len(entries)
        return PromptLogprobs(start, entries) if entries else None


class OpenRequests:
    """The table of open requests, and the queue of updates that clients have not been given yet.

    The recorders are told of every change.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self.recorders: list[Recorder] = [] if recorder is None else [recorder]
        self._requests: dict[int, OpenRequest] = {}
        self._updates: list[SeqUpdate] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, seq: int) -> bool:
        return seq in self._requests

    def __iter__(self) -> Iterator[int]:
        """Iterate over the numbers of the requests."""
        return iter(self._requests)

    def __getitem__(self, seq: int) -> OpenRequest:
        return self._requests[seq]

    def get(self, seq: int) -> OpenRequest | None:
        return self._requests.get(seq)

    def add(self, request: EngineRequest) -> None:
        """Add a new request.

        Raises:
            RequestError: its number is in use.
        """
        self._check_new(request)
        self._requests[request.seq] = OpenRequest(request)
        for recorder in self.recorders:
            recorder.added(request)

    def reject(self, request: EngineRequest, error: RequestError | str, refusal: RefusalKind) -> None:
        """End a request that is not accepted. `refusal` is the kind of an error that is given as a message.

        Raises:
            RequestError: its number is in use.
        """
        self._check_new(request)
        update = SeqUpdate(request.seq, (), finish=Finish.ABORT, **error_fields(error, refusal))
        self._updates.append(update)
        for recorder in self.recorders:
            recorder.added(request)
            recorder.ended(update)

    def _check_new(self, request: EngineRequest) -> None:
        if request.seq in self._requests:
            raise RequestError(f"request {request.seq} exists already")

    def note_dispatch(self, seq: int, replica: int) -> None:
        """Note that a replica gets the request."""
        for recorder in self.recorders:
            recorder.dispatched(seq, replica)

    def note_abort(self, seq: int, *, stopped: bool) -> None:
        """Note that the client has aborted the request. `stopped`: because its output has reached a stop text."""
        self._requests[seq].aborted = True
        for recorder in self.recorders if stopped else ():
            recorder.stopped(seq)

    def pass_on(self, update: SeqUpdate, replica: int) -> None:
        """Queue an update of the replica that has the request. The last update ends the request."""
        update = self._requests[update.seq].take(update)
        self._updates.append(update)
        for recorder in self.recorders:
            recorder.updated(replica, update)
        if update.finish is not None:
            del self._requests[update.seq]

    def end(self, seq: int, error: RequestError | str = "", refusal: RefusalKind = RefusalKind.NONE) -> None:
        """End a request without a replica: it was aborted or cannot go on."""
        ended = self._requests.pop(seq)
        update = SeqUpdate(
            seq, (), finish=Finish.ABORT, cached_tokens=ended.cached_tokens or 0, **error_fields(error, refusal)
        )
        self._updates.append(update)
        for recorder in self.recorders:
            recorder.ended(update)

    def clear(self) -> None:
        """Drop all requests without updates: the set has failed."""
        self._requests.clear()

    @property
    def has_updates(self) -> bool:
        return bool(self._updates)

    def take_updates(self) -> list[SeqUpdate]:
        """Return the updates that clients have not been given yet, and empty the queue."""
        updates, self._updates = self._updates, []
        return updates
