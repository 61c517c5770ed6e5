"""Several replicas of an engine, as one EngineClient. A replica that dies leaves its requests to the others."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from shoal.activity import AWAKE, KV_CACHE, Activity
from shoal.cluster.members.replica import close_all
from shoal.cluster.operations import Done, Message, Operations
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.routing.router import RequestRouter
from shoal.cluster.stats import merged
from shoal.errors import ClosedError, EngineError, ReplicasFailed, RequestError, ShoalError
from shoal.log import get_logger
from shoal.protocols import EngineClient, Recorder
from shoal.transport.channel import Channel, wait
from shoal.wire.base import replace_fields
from shoal.wire.engine import (
    ControlReply,
    EngineRequest,
    EngineStats,
    Finish,
    RefusalKind,
    ResetOutcome,
    ResetPrefixCache,
    SeqUpdate,
    error_fields,
    reset_outcome_decoder,
)
from shoal.wire.fleet import Operation
from shoal.wire.ranks import PromptLogprobs
from shoal.wire.tokens import encode_tokens, num_tokens

log = get_logger("replicas")

_SLICE_S = 0.5
_SETTLE_S = 1.0
_MOST_DEATHS = 2  # of replicas, at one place of a request: it is likely what they died of
_MOST_DEATHS_OF_MANY = 3  # ... where replicas come back, and another death costs little
_SAME_PLACE = 16  # tokens that it may have come on since


class ReplicaClient(EngineClient, Protocol):
    """One of several: a Replica. `died`: its failure is not what its engine had to say."""

    name: str
    died: bool
    snapshot: EngineStats | None
    num_messages: int  # how many times its engine has sent something

    @property
    def channel(self) -> Channel: ...

    def ready(self, timeout: float) -> EngineStats | None: ...

    def stats(self, timeout: float | None = None) -> EngineStats: ...

    def tell(self, message: Message) -> None: ...

    def answers(self) -> list[ControlReply]:
        """To what it was told; those that came with the last `updates`."""

    @property
    def has_ended(self) -> bool: ...

    def say_goodbye(self) -> None: ...

    def dismiss(self) -> None: ...

    def end(self, deadline: float) -> None: ...

    def abandon(self) -> None: ...


def wait_for_any(replicas: Sequence[ReplicaClient], timeout: float) -> None:
    """Until one has something to say."""
    wait([replica.channel for replica in replicas], timeout)


@dataclass(slots=True)
class _Flight:
    """A request, and what its client has been given of its output."""

    request: EngineRequest
    output: bytearray = field(default_factory=bytearray)  # tokens, as in the request
    prompt_reported: int = 0  # tokens of the prompt up to which log-probabilities were given
    cached_tokens: int | None = None  # of the prompt, at the replica that was first to report
    aborted: bool = False
    deaths: int = 0  # of replicas that had it, at about the same place
    died_at: int = 0  # tokens of output that it had then
    moved: bool = False  # has a replica had it that has it no more?

    def rest(self) -> EngineRequest:
        """The request as it goes on from the tokens that it has.

        What the prompt's log-probabilities came to is not computed again; a part of them is, and left out of updates.
        """
        request = self.request
        sampling = request.sampling
        if self.prompt_reported >= request.num_prompt_tokens:
            sampling = replace_fields(sampling, prompt_logprobs=-1)
        return replace_fields(request, tokens=request.tokens + bytes(self.output), sampling=sampling)

    def take(self, update: SeqUpdate) -> SeqUpdate:
        """Note what the client is given, and return it without what the client has already."""
        self.output += encode_tokens(update.tokens)
        if self.cached_tokens is None:
            self.cached_tokens = update.cached_tokens
        if update.prompt_logprobs is None and update.cached_tokens == self.cached_tokens:
            return update
        return replace_fields(
            update, cached_tokens=self.cached_tokens, prompt_logprobs=self._unseen(update.prompt_logprobs)
        )

    def note_death(self) -> None:
        length = num_tokens(self.output)
        self.deaths = self.deaths + 1 if length - self.died_at < _SAME_PLACE else 1
        self.died_at = length

    def _unseen(self, found: PromptLogprobs | None) -> PromptLogprobs | None:
        if found is None:
            return None
        start = max(found.start, self.prompt_reported)
        entries = found.entries[start - found.start :]
        self.prompt_reported = start + len(entries)
        return PromptLogprobs(start, entries) if entries else None


class ReplicaSet:
    """What one engine is to its client. Replicas are numbered; the numbers of dead ones are not used again."""

    def __init__(
        self,
        replicas: Mapping[int, ReplicaClient],
        rooms: Mapping[int, ReplicaCapacity],
        *,
        together: bool = False,
        on_close: Callable[[], object] = lambda: None,
        wait_for: Callable[[Sequence[ReplicaClient], float], object] = wait_for_any,
        on_loss: Callable[[int, EngineError], object] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Takes over replicas that are ready; `rooms` says how much each can use at a time. `together`: their ranks
        compute together, so that none can go on when one has failed. `on_close` ends what they needed, and may be
        called more than once. `on_loss` is told of each replica that has failed, by whoever brings it back with
        `admit`: requests wait for that, and nothing ends but by `give_up`."""
        self._live = dict(replicas)
        self._router = RequestRouter(rooms)
        self._ledger = self._router.ledger
        self._operations = Operations(self)
        self._together = together
        self._on_close = on_close
        self._on_loss = on_loss
        self._recorder = recorder
        self._have_drawn: set[int] = set()  # replicas that have given a token since they were started
        self._most_deaths = _MOST_DEATHS if on_loss is None else _MOST_DEATHS_OF_MANY
        self.replays = 0  # how often a request went on after its replica's end
        self._wait_for = wait_for
        self._flights: dict[int, _Flight] = {}
        self._updates: list[SeqUpdate] = []
        self._causes: dict[int, str] = {}  # of the ends of dead replicas
        self._failure: ReplicasFailed | None = None
        self._told = False  # of the failure
        self._closed = False

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_unfinished(self) -> int:
        return len(self._flights)

    @property
    def num_held(self) -> int:
        """The number of requests that replicas have."""
        return self._ledger.num_held

    @property
    def num_waiting(self) -> int:
        """The number of requests that no replica has."""
        return self._ledger.num_waiting

    def held(self, number: int) -> int:
        """Return how many requests a replica has."""
        return self._ledger.held(number)

    def drew(self, number: int) -> bool:
        """Return whether a replica has given a token since it was started."""
        return number in self._have_drawn

    def is_new(self, seq: int) -> bool:
        """Return whether no replica has had this request yet."""
        flight = self._flights.get(seq)
        return flight is not None and self._ledger.holder(seq) is None and not flight.moved

    def is_open(self, seq: int) -> bool:
        """Has this request not ended yet?"""
        return seq in self._flights

    def waiting_for(self, number: int) -> list[int]:
        """Return the requests that wait for this replica, and for no other."""
        return [
            seq
            for seq, flight in self._flights.items()
            if flight.request.replica == number and self._ledger.holder(seq) is None
        ]

    def expect(self, number: int) -> None:
        """Note that a replica is being started, which has drawn nothing yet."""
        self._have_drawn.discard(number)

    def admit(self, number: int, replica: ReplicaClient, room: ReplicaCapacity, activity: Activity = AWAKE) -> None:
        """A replica that is ready joins the others, or is back. `activity` is what it is at; it becomes what they are
        before it is given anything."""
        self._live[number] = replica
        self._router.admit(number, room)
        self._causes.pop(number, None)
        self._operations.admitted(number, activity)

    def retire(self, number: int) -> ReplicaClient:
        """Takes a replica out. What it has goes on at the others, as if it had failed; it is given back, still
        running."""
        replica = self._live.pop(number)
        had = self._router.remove(number)
        self._operations.lost(number)
        self._move_on(had, None)
        return replica

    # --- pauses, sleep and caches --------------------------------------------------------------------------------

    @property
    def activity(self) -> Activity:
        """What all replicas are at. While they do not run, none is given a request."""
        return self._operations.activity

    def operate(self, wanted: Operation, done: Done) -> None:
        """Begins an operation, which goes on with `updates`; `done` is told how it ended."""
        self._operations.begin(wanted, done)

    def set_activity(self, activity: Activity) -> None:
        """As of an EngineClient."""
        self._await(lambda done: self._operations.set_activity(activity, done))

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        """As of an EngineClient."""
        told = self._await(lambda done: self._operations.reset(running=running, done=done))
        return reset_outcome_decoder.decode(told)

    def _await(self, begin: Callable[[Done], None]) -> bytes:
        """Drives the replicas until an operation has ended; their updates are kept."""
        self._check_open()
        outcome: list[bytes | ShoalError] = []
        begin(outcome.append)
        while not outcome:
            self._turn(_SLICE_S)
            if self._failure is not None:
                self._check_open()
        if isinstance(outcome[0], ShoalError):
            raise outcome[0]
        return outcome[0]

    def members(self) -> Collection[int]:
        return self._live.keys()

    def tell(self, number: int, message: Message) -> None:
        """Hands a step of an operation to a replica, and forgets what was known of its prefix cache."""
        if number not in self._live:  # it was lost with another one
            return
        if isinstance(message, ResetPrefixCache) or KV_CACHE in message.activity.missing:
            self._router.forget_prefixes(number)
        try:
            self._live[number].tell(message)
        except EngineError as error:
            self._lose(number, error)

    def abort_all(self) -> None:
        self.abort(list(self._flights))

    # --- requests ------------------------------------------------------------------------------------------------

    def refuse(self, seq: int, error: RequestError | str, refusal: RefusalKind) -> None:
        """Ends a request, wherever it is."""
        flight = self._flights.get(seq)
        if flight is None:
            return
        number = self._ledger.holder(seq)
        if number is not None and number in self._live and not flight.aborted:
            try:
                self._live[number].abort((seq,))
            except EngineError as failure:
                self._lose(number, failure)
        if seq in self._flights:
            self._end_here(seq, error, refusal)

    def give_up(self, why: str) -> None:
        """No replica comes back: all requests end."""
        for seq in list(self._flights):
            self._end_here(seq, why, RefusalKind.LOST)

    def lose(self, number: int, error: EngineError) -> None:
        """A replica that is there is of no use any more: it is ended, and its requests go on elsewhere."""
        self._lose(number, error)

    def bound(self, cut: Callable[[EngineRequest], EngineRequest]) -> None:
        """Before any replica was there: `cut` gives each request as it is to run, or raises a RequestError, with which
        it ends."""
        for seq, flight in list(self._flights.items()):
            try:
                found = cut(flight.request)
            except RequestError as error:
                self._end_here(seq, error)
                continue
            if found != flight.request:
                self._router.ended(seq)
                flight.request = found
                self._router.add(found)

    def reject(self, request: EngineRequest, error: RequestError | str, refusal: RefusalKind) -> None:
        """End a request that is not taken. `refusal` is the kind of an error that is given as a message.

        Raises:
            RequestError: its number is in use.
        """
        self._check_new(request)
        update = SeqUpdate(request.seq, (), finish=Finish.ABORT, **error_fields(error, refusal))
        self._updates.append(update)
        if self._recorder is not None:
            self._recorder.added(request)
            self._recorder.ended(update)

    def _check_new(self, request: EngineRequest) -> None:
        if request.seq in self._flights:
            raise RequestError(f"request {request.seq} exists already")

    def add(self, request: EngineRequest) -> None:
        """
        Raises:
            RequestError: its number is in use.
            EngineError: no replica is left.
        """
        self._check_open()
        self._check_new(request)
        self._flights[request.seq] = _Flight(request)
        if self._recorder is not None:
            self._recorder.added(request)
        self._router.add(request)
        self._deal()

    def abort(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        """`stopped`: their clients have all they wanted, up to a stop text."""
        there: dict[int, list[int]] = {}
        for seq in seqs:
            flight = self._flights.get(seq)
            if flight is None or flight.aborted:
                continue
            flight.aborted = True
            if stopped and self._recorder is not None:
                self._recorder.stopped(seq)
            number = self._ledger.holder(seq)
            if number is None:
                self._end_here(seq)
            else:
                there.setdefault(number, []).append(seq)
        for number, some in there.items():
            try:
                if number in self._live:
                    self._live[number].abort(some)
            except EngineError as error:
                self._lose(number, error)

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._turn(0.0 if self._updates else timeout)
        if not self._updates:
            self._check_open()
        updates, self._updates = self._updates, []
        return updates

    def _turn(self, timeout: float) -> None:
        self._deal()
        if self._closed or self._failure is not None:
            return
        self._wait_for(list(self._live.values()), 0.0 if self._updates else timeout)
        for number in list(self._live):
            self._collect(number)
        self._operations.tick()
        self._deal()

    def stats(self) -> EngineStats:
        """Of the replicas that are left, and what waits here."""
        self._check_open()
        found = []
        for number in list(self._live):
            try:
                if number in self._live:  # it may be lost with another one
                    found.append(self._live[number].stats())
            except EngineError as error:
                self._lose(number, error)
        self._check_open()
        total = merged(found)
        return replace_fields(total, waiting=total.waiting + self._ledger.num_waiting)

    def close(self) -> None:
        """Ends all replicas at the same time. Idempotent, never raises."""
        if not self._closed and self._together:
            self._settle()
        self._closed = True
        close_all(list(self._live.values()))
        self._on_close()

    def _settle(self) -> None:
        """Lets steps end for which the ranks of all replicas are needed. An engine answers when what it had launched
        has ended; after the first answer it may still tell its ranks what to forget, after the second it rests."""
        with suppress(EngineError):
            self.abort(list(self._flights))
            for replica in [*self._live.values()] * 2:
                replica.stats(_SETTLE_S)

    def _deal(self) -> None:
        while self.activity.runs and (found := self._router.next()) is not None:
            request, number = found
            if self._recorder is not None:
                self._recorder.dealt(request.seq, number)
            try:
                self._live[number].add(request)
            except EngineError as error:
                self._lose(number, error)
            except Exception as error:  # what one request brings along ends no other
                log.exception("request %d could not be sent", request.seq)
                why = f"the request could not be sent: {type(error).__name__}: {error}"
                self._end_here(request.seq, why, RefusalKind.FAILED)

    def _collect(self, number: int) -> None:
        if number not in self._live:  # it was lost with another one
            return
        try:
            updates = self._live[number].updates(0)
        except EngineError as error:
            self._lose(number, error)
            return
        for told in self._live[number].answers():
            self._operations.told(number, told)
        for update in updates:
            flight = self._flights.get(update.seq)
            if flight is not None and self._ledger.holder(update.seq) == number:
                self._router.drew(update.seq, len(update.tokens))
                if update.tokens:
                    self._have_drawn.add(number)
                self._updates.append(flight.take(update))
                if self._recorder is not None:
                    self._recorder.updated(number, self._updates[-1])
                if update.finish is not None:
                    del self._flights[update.seq]
                    self._router.ended(update.seq)

    def _end_here(self, seq: int, error: RequestError | str = "", refusal: RefusalKind = RefusalKind.NONE) -> None:
        """Ends a request that was aborted or can't go on, whatever a replica may still say of it."""
        flight = self._flights.pop(seq)
        self._updates.append(
            SeqUpdate(
                seq,
                (),
                finish=Finish.ABORT,
                cached_tokens=flight.cached_tokens or 0,
                **error_fields(error, refusal),
            )
        )
        if self._recorder is not None:
            self._recorder.ended(self._updates[-1])
        self._router.ended(seq)

    def _lose(self, number: int, error: EngineError) -> None:
        """A replica is no more. Its requests go on at the others, from the tokens that clients have."""
        replica = self._live.pop(number, None)
        if replica is None:
            return
        replica.abandon()
        had = self._router.remove(number)
        self._operations.lost(number)
        self._causes[number] = str(error)
        if self._on_loss is None and (self._together or not self._live):
            self._fail(replica)
            return
        self._log_loss(len(had), error)
        self._move_on(had, error)
        if self._on_loss is not None:
            self._on_loss(number, error)
            if self._together:
                for other in list(self._live):
                    self._lose(other, EngineError(f"replica {number} has failed, without which it can't go on"))

    def _log_loss(self, left: int, error: EngineError) -> None:
        count = len(self._live)
        if self._together:
            where = "wait until all replicas are back"
        elif count:
            where = f"go on at the {count} replica{'s' if count > 1 else ''} left"
        else:
            where = "wait until one is back"
        log.warning("%s; its %d unfinished requests %s", error, left, where)

    def _move_on(self, seqs: Sequence[int], error: EngineError | None) -> None:
        """Have the requests of a replica go on at others. `error`: it died; None: it was asked to leave."""
        for seq in seqs:
            flight = self._flights[seq]
            flight.moved = True
            if error is not None:
                flight.note_death()
            if flight.aborted:
                self._end_here(seq)
            elif flight.deaths >= self._most_deaths:
                self._end_here(
                    seq,
                    f"{flight.deaths} replicas failed one after the other while they had this request, and no other "
                    f"one is given it; the last: {error}",
                    RefusalKind.FAILED,
                )
            else:
                self.replays += 1
                self._router.add(flight.rest())

    def audit(self) -> None:
        """Hold the books against each other.

        Raises:
            EngineError: they differ.
        """
        wrong = [seq for seq in self._flights if not self._ledger.is_open(seq)]
        if wrong or len(self._flights) != self._ledger.num_open:
            raise EngineError(
                f"{len(self._flights)} requests have not ended, but {self._ledger.num_open} are in the ledger; "
                f"missing there: {wrong}"
            )
        self._router.audit()

    def _fail(self, last: ReplicaClient) -> None:
        """Nobody can go on."""
        if self._together:
            cause = self._cause_of(last)
            message = f"{cause}; replicas that share experts end together"
        else:
            causes = "; ".join(self._causes[number] for number in sorted(self._causes))
            message = f"no replica is left: {causes}"
        close_all(list(self._live.values()))
        for number in self._live:
            self._router.remove(number)
        self._live.clear()
        for seq in self._flights:
            self._router.ended(seq)
        self._flights.clear()
        self._failure = ReplicasFailed(message)

    def _cause_of(self, first: ReplicaClient) -> str:
        """What took them all down: one that died before one that reports, as the others lose contact to it."""
        causes = list(self._causes.values())
        if first.died:
            return causes[0]
        for replica in self._live.values():
            try:
                replica.updates(0)
            except EngineError as error:
                if replica.died:
                    return str(error)
        return causes[0]

    def _check_open(self) -> None:
        if self._failure is not None and not self._told:
            self._told = True
            raise self._failure
        if self._failure is not None:
            raise ClosedError(f"the engine has failed: {self._failure}")
        if self._closed:
            raise ClosedError("the engine was closed")


def await_ready(replicas: Mapping[int, ReplicaClient], timeout: float) -> dict[int, EngineStats]:
    """Waits until all of them can take requests; gives what each says of itself. One that fails ends the others.

    Raises:
        UserError: a replica was asked for something that can't work; it is named.
        EngineError: one failed, or was not ready within `timeout` seconds.
    """
    begun = time.monotonic()
    found: dict[int, EngineStats] = {}
    try:
        while missing := {number: replica for number, replica in replicas.items() if number not in found}:
            if time.monotonic() - begun > timeout:
                names = ", ".join(replica.name for replica in missing.values())
                raise EngineError(f"{names}: not ready within {timeout:g} s")
            wait_for_any(list(missing.values()), _SLICE_S)
            for number, replica in missing.items():
                stats = replica.ready(0)
                if stats is not None:
                    found[number] = stats
                    log.info(
                        "%s is ready after %.2f s: %d KV blocks, %d of %d",
                        *(replica.name, time.monotonic() - begun, stats.num_blocks, len(found), len(replicas)),
                    )
    except BaseException:
        close_all(list(replicas.values()))
        raise
    return found
