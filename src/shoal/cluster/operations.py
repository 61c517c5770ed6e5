"""Pauses, sleeps and cache resets of all replicas together. This module needs no processes.

An operation consists of transitions. All replicas complete a transition before any begins the next, so that no replica
in lockstep computes while another one has no weights. Operations run one after the other. An operation that waits for
requests to end is cancelled when the next operation arrives.
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from shoal.activity import AWAKE, Activity
from shoal.errors import ConfigError, EngineError, ShoalError, UserError
from shoal.wire.base import encode
from shoal.wire.engine import (
    ControlReply,
    EngineOrder,
    ResetOutcome,
    ResetPrefixCache,
    SetActivity,
    reset_outcome_decoder,
)
from shoal.wire.fleet import Operation

MODES = ("abort", "wait", "keep")

Done = Callable[[bytes | ShoalError], object]
"""A function that is called once, with the outcome of an operation or its error."""


class OperatedReplicas(Protocol):
    """The replicas that carry out operations."""

    def live_numbers(self) -> Collection[int]: ...

    def send_order(self, number: int, order: EngineOrder) -> None:
        """Send an order to a replica. Its answer is given to `Operations.take_answer` later. Never raises."""

    @property
    def num_held(self) -> int:
        """The number of requests that replicas have."""

    def abort_all(self) -> None: ...

    def lose(self, number: int, error: EngineError) -> None: ...


@dataclass(slots=True, eq=False)
class _Operation:
    verb: str
    change: Callable[[Activity], Activity]  # from the present activity to the one after the operation
    done: Done
    mode: str = "keep"
    reset: bool = False  # True: the last transition empties the prefix caches
    running: bool = False  # True: a reset makes running requests compute their blocks again too
    activity_before: Activity = AWAKE
    transitions: deque[Activity | None] = field(default_factory=deque)  # None: empty the prefix caches
    awaited: set[int] = field(default_factory=set)  # the orders of the present transition without an answer
    draining: bool = False  # True: it waits for requests to end
    forgotten: int = 0  # blocks that were in the prefix caches
    held: int = 0  # blocks that running requests still use
    rejected: ShoalError | None = None  # the error of a replica that could not obey in the present transition
    undone_because: ShoalError | None = None  # the error after which all replicas return to `activity_before`

    @property
    def outcome(self) -> bytes:
        return encode(ResetOutcome(self.forgotten, self.held)) if self.reset else b""


class Operations:
    """The queue of operations, of which one runs at a time.

    `activity` is the activity of all replicas. During an operation it is the less active one of before and after.
    """

    def __init__(self, replicas: OperatedReplicas) -> None:
        self.activity = AWAKE
        self._replicas = replicas
        self._ids = itertools.count()
        self._unanswered: dict[int, tuple[int, _Operation | None]] = {}  # order -> its replica and operation
        self._last_ordered = AWAKE  # the activity that all replicas were ordered to last
        self._queue: deque[_Operation] = deque()
        self._current: _Operation | None = None

    def begin(self, wanted: Operation, done: Done) -> None:
        """Begin an operation, or queue it.

        `done` gets a ResetOutcome if the operation resets caches, or an error: a UserError if the operation is not
        possible.
        """
        try:
            self._enqueue(_operation_of(wanted, done))
        except UserError as error:
            done(error)

    def set_activity(self, activity: Activity, done: Done) -> None:
        """Bring all replicas to this activity, whatever their present one is."""
        self._enqueue(_Operation("set_activity", lambda _: activity, done))

    def reset(self, *, running: bool, done: Done) -> None:
        """Empty the prefix caches of all replicas."""
        self._enqueue(_Operation("reset_prefix_cache", lambda now: now, done, reset=True, running=running))

    def _enqueue(self, operation: _Operation) -> None:
        self._queue.append(operation)
        current = self._current
        if current is not None and current.draining:
            self.activity = current.activity_before
            why = f"{current.verb}: cancelled by {operation.verb} before all requests had ended"
            self._end(current, ConfigError(why))
        self.tick()

    # --- events of replicas --------------------------------------------------------------------------------------

    def admitted(self, number: int, activity: Activity) -> None:
        """Note that a replica has joined with this activity. It is ordered to the activity of the others."""
        if activity != self._last_ordered:
            self._order(number, None, self._last_ordered)

    def lost(self, number: int) -> None:
        """Note that a replica has left. Its answers are not awaited any more."""
        for order in [order for order, (replica, _) in self._unanswered.items() if replica == number]:
            _, operation = self._unanswered.pop(order)
            if operation is not None:
                operation.awaited.discard(order)

    def take_answer(self, number: int, answer: ControlReply) -> None:
        """Take a replica's answer to an order."""
        _, operation = self._unanswered.pop(answer.id, (number, None))
        if operation is None:
            if answer.error:
                why = f"replica {number} cannot be brought to the activity of the others: {answer.error}"
                self._replicas.lose(number, EngineError(why))
            return
        operation.awaited.discard(answer.id)
        if answer.error:
            operation.rejected = UserError(answer.error) if answer.user_error else EngineError(answer.error)
        elif answer.payload:
            outcome = reset_outcome_decoder.decode(answer.payload)
            operation.forgotten += outcome.forgotten
            operation.held += outcome.held

    # --- transitions ---------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Begin all transitions that need not wait for requests or answers."""
        while (operation := self._current or self._start_next()) is not None:
            if operation.draining and self._replicas.num_held:
                return
            operation.draining = False
            if operation.awaited:
                return
            self._begin_transition(operation)

    def _start_next(self) -> _Operation | None:
        while self._queue:
            operation = self._queue.popleft()
            try:
                target = operation.change(self.activity)
            except UserError as error:
                operation.done(error)
                continue
            operation.activity_before = self.activity
            if target != self.activity:
                operation.transitions.extend(self.activity.steps_to(target))
            if operation.reset:
                operation.transitions.append(None)
            if not target.runs:  # no replica is given a request from now on
                self.activity = self.activity.pause()
                operation.draining = operation.mode == "wait"
                if operation.mode == "abort":
                    self._replicas.abort_all()
            self._current = operation
            return operation
        return None

    def _begin_transition(self, operation: _Operation) -> None:
        """Order all replicas to the next activity, or end the operation if this was the last one."""
        if operation.rejected is not None and operation.undone_because is None:
            operation.undone_because, operation.rejected = operation.rejected, None
            operation.transitions = deque([operation.activity_before])
        if not operation.transitions:
            self.activity = self._last_ordered
            self._end(operation, operation.undone_because or operation.outcome)
            return
        activity = operation.transitions.popleft()
        if activity is not None:
            self._last_ordered = activity
        for number in list(self._replicas.live_numbers()):
            self._order(number, operation, activity)

    def _order(self, number: int, operation: _Operation | None, activity: Activity | None) -> None:
        """Order a replica to an activity; None: to empty its prefix cache."""
        order = next(self._ids)
        self._unanswered[order] = (number, operation)
        if operation is not None:
            operation.awaited.add(order)
        running = operation is not None and operation.running
        message = ResetPrefixCache(order, running) if activity is None else SetActivity(order, activity)
        self._replicas.send_order(number, message)

    def _end(self, operation: _Operation, outcome: bytes | ShoalError) -> None:
        self._current = None
        operation.done(outcome)


def _operation_of(wanted: Operation, done: Done) -> _Operation:
    """Return the operation that a client wants.

    Raises:
        ConfigError: there is no operation with this verb, or none with this mode, level or tag.
    """
    if wanted.mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {wanted.mode[:40]!r}")
    match wanted.verb:
        case "pause":
            clears = wanted.clear_cache and wanted.mode != "keep"
            return _Operation("pause", lambda now: now.pause(), done, wanted.mode, reset=clears)
        case "resume":
            return _Operation("resume", lambda now: now.resume(), done)
        case "sleep":
            return _Operation("sleep", lambda now: now.sleep(wanted.level), done, wanted.mode)
        case "wake_up":
            return _Operation("wake_up", lambda now: now.wake_up(wanted.tags), done)
        case "reset_prefix_cache":
            return _Operation(wanted.verb, lambda now: now, done, reset=True, running=wanted.running)
        case _:
            raise ConfigError(f"there is no operation {wanted.verb[:40]!r}")
