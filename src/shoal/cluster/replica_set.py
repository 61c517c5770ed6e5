"""Several replicas as one engine. If a replica dies, its requests go on at the others."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

from shoal.activity import AWAKE, KV_CACHE, Activity
from shoal.cluster.open_requests import OpenRequests
from shoal.cluster.operations import Done, Operations
from shoal.cluster.replica_traces import ReplicaTraces
from shoal.cluster.replicas.failure_state import FailureState
from shoal.cluster.replicas.replica import close_all
from shoal.cluster.replicas.replica_client import ReplicaClient, wait_for_any
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.routing.router import RequestRouter
from shoal.cluster.stats import merge_stats
from shoal.errors import EngineError, ReplicasFailed, RequestError, ShoalError
from shoal.log import get_logger
from shoal.protocols import Recorder
from shoal.wire.base import replace_fields
from shoal.wire.engine import (
    EngineOrder,
    EngineRequest,
    EngineStats,
    RefusalKind,
    ResetOutcome,
    ResetPrefixCache,
    SeqUpdate,
    reset_outcome_decoder,
)
from shoal.wire.fleet import Operation
from shoal.wire.trace import TraceEvents

log = get_logger("replicas")

_SLICE_S = 0.5  # how long one wait for an outcome takes
_TRACE_S = 30.0  # how long replicas may take to end a trace
_LAST_STEPS_S = 1.0  # how long closing waits for each answer of a replica in lockstep
_MOST_DEATHS = 2  # a request ends after so many deaths without progress in between: it is the likely cause
_MOST_DEATHS_WITH_RESTARTS = 3  # ... if replicas are started again, so that another death costs little


class ReplicaSet(FailureState):
    """Several replicas as one `EngineClient`.

    Replicas have numbers. A number is used again only for a replica that has been started again.
    """

    def __init__(
        self,
        replicas: Mapping[int, ReplicaClient],
        capacities: Mapping[int, ReplicaCapacity],
        *,
        in_lockstep: bool = False,
        on_close: Callable[[], object] = lambda: None,
        wait_for: Callable[[Sequence[ReplicaClient], float], object] = wait_for_any,
        on_loss: Callable[[int, EngineError], object] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Take over replicas that are ready.

        Args:
            capacities: how much each replica can have at a time.
            in_lockstep: True if the replicas compute in lockstep, so that none can go on when one has failed.
            on_close: ends what the replicas needed. It may be called more than once.
            wait_for: waits until a replica has sent something, or for some seconds.
            on_loss: is called for each replica that has failed, with its number and error. The owner then starts the
                replica again and calls `admit`, or calls `end_all`; until then requests wait. None: replicas are not
                started again, so the set fails with its last replica.
        """
        self._live = dict(replicas)
        self._router = RequestRouter(capacities)
        self._ledger = self._router.ledger
        self._operations = Operations(self)
        self.traces = ReplicaTraces(self)
        self._in_lockstep = in_lockstep
        self._on_close = on_close
        self._on_loss = on_loss
        self._wait_for = wait_for
        self._requests = OpenRequests(recorder)
        self._have_drawn: set[int] = set()  # replicas that have drawn a token in their present run
        self._most_deaths = _MOST_DEATHS if on_loss is None else _MOST_DEATHS_WITH_RESTARTS
        self.replays = 0  # how many times a request was continued because its replica had ended
        self._causes: dict[int, str] = {}  # dead replica -> why it died

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    @property
    def num_held(self) -> int:
        """The number of requests that replicas have."""
        return self._ledger.num_held

    @property
    def num_waiting(self) -> int:
        """The number of requests that no replica has."""
        return self._ledger.num_waiting

    def num_held_by(self, number: int) -> int:
        """Return how many requests a replica has."""
        return self._ledger.num_held_by(number)

    def has_drawn(self, number: int) -> bool:
        """Return whether a replica has drawn a token in its present run."""
        return number in self._have_drawn

    def is_new(self, seq: int) -> bool:
        """Return whether no replica has had this request yet."""
        found = self._requests.get(seq)
        return found is not None and self._ledger.holder(seq) is None and not found.moved

    def is_open(self, seq: int) -> bool:
        """Return whether this request has not ended yet."""
        return seq in self._requests

    def waiting_for(self, number: int) -> list[int]:
        """Return the requests that only this replica may run, and that it does not have yet."""
        return [
            seq
            for seq in self._requests
            if self._requests[seq].request.replica == number and self._ledger.holder(seq) is None
        ]

    # --- replicas ------------------------------------------------------------------------------------------------

    def note_start(self, number: int) -> None:
        """Note that a replica is being started: its new run has drawn nothing yet."""
        self._have_drawn.discard(number)

    def admit(self, number: int, replica: ReplicaClient, capacity: ReplicaCapacity, activity: Activity = AWAKE) -> None:
        """Add a replica that is ready.

        `activity` is its present activity. Before it gets requests, it is brought to the activity of the others.
        """
        self._live[number] = replica
        self._router.admit(number, capacity)
        self._causes.pop(number, None)
        self._operations.admitted(number, activity)
        self.traces.admitted(number)

    def retire(self, number: int) -> ReplicaClient:
        """Take a replica out, and return it still running. Its requests go on at the others."""
        replica = self._live.pop(number)
        requests = self._router.remove(number)
        self._operations.lost(number)
        self.traces.lost(number, replica)
        self._requeue(requests, None)
        return replica

    def lose(self, number: int, error: EngineError) -> None:
        """Kill a replica that has failed. Its requests go on at the others, after the tokens that clients have."""
        replica = self._live.pop(number, None)
        if replica is None:
            return
        replica.abandon()
        requests = self._router.remove(number)
        self._operations.lost(number)
        self.traces.lost(number, replica)
        self._causes[number] = str(error)
        if self._on_loss is None and (self._in_lockstep or not self._live):
            self._fail(replica)
            return
        self._log_loss(len(requests), error)
        self._requeue(requests, error)
        if self._on_loss is not None:
            self._on_loss(number, error)
            if self._in_lockstep:
                for other in list(self._live):
                    self.lose(other, EngineError(f"replica {number}, without which it cannot go on, has failed"))

    def _log_loss(self, num_requests: int, error: EngineError) -> None:
        count = len(self._live)
        if self._in_lockstep:
            outlook = "wait until all replicas are back"
        elif count:
            outlook = f"go on at the {count} replica{'s' if count > 1 else ''} left"
        else:
            outlook = "wait until a replica is back"
        log.warning("%s; its %d unfinished requests %s", error, num_requests, outlook)

    def _requeue(self, seqs: Sequence[int], error: EngineError | None) -> None:
        """Let the requests of a replica that has left go on at others. `error`: why it died; None: it was taken out."""
        for seq in seqs:
            moving = self._requests[seq]
            moving.moved = True
            if error is not None:
                moving.note_death()
            if moving.aborted:
                self._end_request(seq)
            elif moving.deaths >= self._most_deaths:
                why = (
                    f"{moving.deaths} replicas failed one after the other while they had this request, so it is not "
                    f"tried again; the last failure: {error}"
                )
                self._end_request(seq, why, RefusalKind.FAILED)
            else:
                self.replays += 1
                self._router.add(moving.continuation())

    # --- pauses, sleep and caches --------------------------------------------------------------------------------

    @property
    def activity(self) -> Activity:
        """The activity of all replicas. While they do not run, no replica gets a request."""
        return self._operations.activity

    def operate(self, wanted: Operation, done: Done) -> None:
        """Begin an operation, which goes on during `updates`. `done` is called with the outcome."""
        self._operations.begin(wanted, done)

    def set_activity(self, activity: Activity) -> None:
        """Bring all replicas to an activity, as `Engine.set_activity` says."""
        self._await_outcome(lambda done: self._operations.set_activity(activity, done))

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        """Empty the prefix caches of all replicas, as `Engine.reset_prefix_cache` says."""
        outcome = self._await_outcome(lambda done: self._operations.reset(running=running, done=done))
        return reset_outcome_decoder.decode(outcome)

    def _await_outcome(self, begin: Callable[[Done], None]) -> bytes:
        """Run the replicas until an operation has ended. Updates are kept for the next `updates`."""
        self._check_open()
        outcome: list[bytes | ShoalError] = []
        begin(outcome.append)
        while not outcome:
            self._run_once(_SLICE_S)
            if self._failure is not None:
                self._check_open()
        if isinstance(outcome[0], ShoalError):
            raise outcome[0]
        return outcome[0]

    def live_numbers(self) -> Collection[int]:
        return self._live.keys()

    def live_replica(self, number: int) -> ReplicaClient | None:
        return self._live.get(number)

    def send_order(self, number: int, order: EngineOrder) -> None:
        """Send an order to a replica. If it loses its KV cache by that, the router forgets its prefixes."""
        if number not in self._live:  # it was lost together with another one
            return
        if isinstance(order, ResetPrefixCache) or KV_CACHE in order.activity.missing:
            self._router.forget_prefixes(number)
        try:
            self._live[number].send_order(order)
        except EngineError as error:
            self.lose(number, error)

    # --- traces --------------------------------------------------------------------------------------------------

    def begin_trace(self, limit: int) -> None:
        """Have all replicas record, as `TracedClient` says; those that are started again or added later too."""
        self.traces.begin(limit)

    def take_trace(self) -> list[TraceEvents]:
        return self.traces.take()

    def end_trace(self) -> list[TraceEvents]:
        self.traces.end()
        deadline = time.monotonic() + _TRACE_S
        while not self.traces.has_ended and time.monotonic() < deadline and self._failure is None:
            self._run_once(_SLICE_S)
        return self.traces.take()

    @property
    def recorders(self) -> list[Recorder]:
        """Those who are told of all requests that are added. Others may be added and removed."""
        return self._requests.recorders

    def abort_all(self) -> None:
        self.abort(list(self._requests))

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Take a request over, as `EngineClient.add` says.

        Raises:
            RequestError: its number is in use.
            EngineError: no replica is left.
        """
        self._check_open()
        self._requests.add(request)
        self._router.add(request)
        self._dispatch()

    def reject(self, request: EngineRequest, error: RequestError | str, refusal: RefusalKind) -> None:
        """End a request that is not accepted. `refusal` is the kind of an error that is given as a message.

        Raises:
            RequestError: its number is in use.
        """
        self._requests.reject(request, error, refusal)

    def refuse(self, seq: int, error: RequestError | str, refusal: RefusalKind) -> None:
        """End a request with an error, at its replica too."""
        found = self._requests.get(seq)
        if found is None:
            return
        number = self._ledger.holder(seq)
        if number is not None and number in self._live and not found.aborted:
            try:
                self._live[number].abort((seq,))
            except EngineError as failure:
                self.lose(number, failure)
        if seq in self._requests:
            self._end_request(seq, error, refusal)

    def end_all(self, why: str) -> None:
        """End all requests: no replica will come back."""
        for seq in list(self._requests):
            self._end_request(seq, why, RefusalKind.LOST)

    def revise(self, revise: Callable[[EngineRequest], EngineRequest]) -> None:
        """Replace each request by `revise(request)`, before any replica has one. If a RequestError is raised, the
        request ends with it."""
        for seq in list(self._requests):
            waiting = self._requests[seq]
            try:
                revised = revise(waiting.request)
            except RequestError as error:
                self._end_request(seq, error)
                continue
            if revised != waiting.request:
                self._router.ended(seq)
                waiting.request = revised
                self._router.add(revised)

    def abort(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        """Abort requests. `stopped`: their outputs are complete, as they have reached a stop text."""
        by_replica: dict[int, list[int]] = {}
        for seq in seqs:
            found = self._requests.get(seq)
            if found is None or found.aborted:
                continue
            self._requests.note_abort(seq, stopped=stopped)
            number = self._ledger.holder(seq)
            if number is None:
                self._end_request(seq)
            else:
                by_replica.setdefault(number, []).append(seq)
        for number, some in by_replica.items():
            try:
                if number in self._live:
                    self._live[number].abort(some)
            except EngineError as error:
                self.lose(number, error)

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._run_once(timeout)
        if not self._requests.has_updates:
            self._check_open()
        return self._requests.take_updates()

    def _run_once(self, timeout: float) -> None:
        """Dispatch requests, wait for replicas unless there are updates already, and take what they have sent."""
        self._dispatch()
        if self._closed or self._failure is not None:
            return
        self._wait_for(list(self._live.values()), 0.0 if self._requests.has_updates else timeout)
        for number in list(self._live):
            self._collect(number)
        self._operations.tick()
        self._dispatch()

    def _dispatch(self) -> None:
        while self.activity.runs and (found := self._router.next()) is not None:
            request, number = found
            self._requests.note_dispatch(request.seq, number)
            try:
                self._live[number].add(request)
            except EngineError as error:
                self.lose(number, error)
            except Exception as error:  # a fault of one request must not end the others
                log.exception("request %d could not be sent", request.seq)
                why = f"the request could not be sent: {type(error).__name__}: {error}"
                self._end_request(request.seq, why, RefusalKind.FAILED)

    def _collect(self, number: int) -> None:
        """Take the updates and answers of a replica."""
        if number not in self._live:  # it was lost together with another one
            return
        try:
            updates = self._live[number].updates(0)
        except EngineError as error:
            self.lose(number, error)
            return
        self.traces.collect(number, self._live[number])
        for answer in self._live[number].answers():
            self._operations.take_answer(number, answer)
        for update in updates:
            if self._ledger.holder(update.seq) != number:
                continue  # the request has ended or moved
            self._router.drew(update.seq, len(update.tokens))
            if update.tokens:
                self._have_drawn.add(number)
            self._requests.pass_on(update, number)
            if update.finish is not None:
                self._router.ended(update.seq)

    def _end_request(self, seq: int, error: RequestError | str = "", refusal: RefusalKind = RefusalKind.NONE) -> None:
        """End a request here. Later updates of its replica are dropped."""
        self._requests.end(seq, error, refusal)
        self._router.ended(seq)

    # --- the set as a whole --------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Return the sums over the live replicas, with the requests that wait here."""
        self._check_open()
        found = []
        for number in list(self._live):
            try:
                if number in self._live:  # it may be lost together with another one
                    found.append(self._live[number].stats())
            except EngineError as error:
                self.lose(number, error)
        self._check_open()
        total = merge_stats(found)
        return replace_fields(total, waiting=total.waiting + self._ledger.num_waiting)

    def close(self) -> None:
        """End all replicas at the same time. Idempotent, never raises."""
        if not self._closed and self._in_lockstep:
            self._finish_steps()
        self._closed = True
        close_all(list(self._live.values()))
        self._on_close()

    def _finish_steps(self) -> None:
        """Abort all requests, and wait until the steps in flight, which need the ranks of all replicas, have ended.

        An engine answers after the steps that it had launched. After the first answer it may launch another step, in
        which ranks forget sequences. After the second answer it launches no more.
        """
        with suppress(EngineError):
            self.abort(list(self._requests))
            for replica in [*self._live.values()] * 2:
                replica.stats(_LAST_STEPS_S)

    def audit(self) -> None:
        """Compare the open requests with those in the ledger, and audit the router.

        Raises:
            EngineError: they differ.
        """
        missing = [seq for seq in self._requests if not self._ledger.is_open(seq)]
        if missing or len(self._requests) != self._ledger.num_open:
            raise EngineError(
                f"{len(self._requests)} requests have not ended, but {self._ledger.num_open} are in the ledger; "
                f"missing there: {missing}"
            )
        self._router.audit()

    def _fail(self, last: ReplicaClient) -> None:
        """Drop all requests and end all replicas: the set cannot go on without the one that was lost `last`."""
        if self._in_lockstep:
            message = f"{self._first_cause(last)}; replicas that share experts end together"
        else:
            causes = "; ".join(self._causes[number] for number in sorted(self._causes))
            message = f"no replica is left: {causes}"
        close_all(list(self._live.values()))
        for number in self._live:
            self._router.remove(number)
        self._live.clear()
        for seq in self._requests:
            self._router.ended(seq)
        self._requests.clear()
        self._failure = ReplicasFailed(message)

    def _first_cause(self, reported: ReplicaClient) -> str:
        """Return why replicas in lockstep have failed.

        If one died, that is the cause, even if another one was the first to report an error: it lost its connection to
        the dead one.
        """
        causes = list(self._causes.values())
        if reported.died:
            return causes[0]
        for replica in self._live.values():
            try:
                replica.updates(0)
            except EngineError as error:
                if replica.died:
                    return str(error)
        return causes[0]
