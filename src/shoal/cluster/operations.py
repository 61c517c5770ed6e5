"""Pauses, sleep and resets of caches for all replicas together. Free of processes.

An operation has steps, and each is taken by all replicas before any takes the next: of replicas that compute together
none runs while another one has no weights. Operations follow each other; one that waits for requests to end is called
off by the next.
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from shoal.activity import AWAKE, Activity
from shoal.errors import ConfigError, EngineError, ShoalError, UserError
from shoal.wire.base import encode
from shoal.wire.engine import ControlReply, ResetOutcome, ResetPrefixCache, SetActivity, reset_outcome_decoder
from shoal.wire.fleet import Operation

MODES = ("abort", "wait", "keep")

Message = SetActivity | ResetPrefixCache
Done = Callable[[bytes | ShoalError], object]  # is told how it ended, once


class Group(Protocol):
    """Those who take the steps."""

    def members(self) -> Collection[int]: ...

    def tell(self, number: int, message: Message) -> None:
        """`Operations.told` has the answer, in its time; never raises."""

    @property
    def num_held(self) -> int:
        """Requests that replicas have."""

    def abort_all(self) -> None: ...

    def lose(self, number: int, error: EngineError) -> None: ...


@dataclass(slots=True, eq=False)
class _Operation:
    verb: str
    change: Callable[[Activity], Activity]
    done: Done
    mode: str = "keep"
    reset: bool = False  # of the prefix caches, in the end
    running: bool = False  # ... and of what requests hold
    before: Activity = AWAKE
    steps: deque[Activity | None] = field(default_factory=deque)  # None: the reset
    awaited: set[int] = field(default_factory=set)  # questions
    draining: bool = False  # it waits for requests to end
    forgotten: int = 0
    held: int = 0
    problem: ShoalError | None = None  # a replica can't
    failure: ShoalError | None = None  # why all went back to what they were at before

    @property
    def found(self) -> bytes:
        return encode(ResetOutcome(self.forgotten, self.held)) if self.reset else b""


class Operations:
    """`activity` is what all replicas are at; on their way they are at the one of both that does less."""

    def __init__(self, group: Group) -> None:
        self.activity = AWAKE
        self._group = group
        self._ids = itertools.count()
        self._asked: dict[int, tuple[int, _Operation | None]] = {}  # questions: the replica, and for what
        self._said = AWAKE  # to all of them, last
        self._queue: deque[_Operation] = deque()
        self._now: _Operation | None = None

    def begin(self, wanted: Operation, done: Done) -> None:
        """`done` is given the ResetOutcome of a reset, or the error: a UserError where the operation can't be."""
        try:
            self._enter(_operation_of(wanted, done))
        except UserError as error:
            done(error)

    def set_activity(self, activity: Activity, done: Done) -> None:
        """All are to be at this, whatever they are at."""
        self._enter(_Operation("become", lambda _: activity, done))

    def reset(self, *, running: bool, done: Done) -> None:
        self._enter(_Operation("reset_prefix_cache", lambda now: now, done, reset=True, running=running))

    def _enter(self, operation: _Operation) -> None:
        self._queue.append(operation)
        if self._now is not None and self._now.draining:
            self.activity = self._now.before
            self._end(
                self._now, ConfigError(f"{self._now.verb}: called off by {operation.verb}, before requests ended")
            )
        self.tick()

    # --- what happens to replicas --------------------------------------------------------------------------------

    def admitted(self, number: int, activity: Activity) -> None:
        """A replica is there, and is at `activity`: it is told what the others were told."""
        if activity != self._said:
            self._ask(number, None, self._said)

    def lost(self, number: int) -> None:
        """Nobody waits for a replica that is no more."""
        for question in [question for question, (asked, _) in self._asked.items() if asked == number]:
            _, operation = self._asked.pop(question)
            if operation is not None:
                operation.awaited.discard(question)

    def told(self, number: int, told: ControlReply) -> None:
        _, operation = self._asked.pop(told.id, (number, None))
        if operation is None:
            if told.error:
                self._group.lose(number, EngineError(f"replica {number} is not what the others are: {told.error}"))
            return
        operation.awaited.discard(told.id)
        if told.error:
            operation.problem = UserError(told.error) if told.user_error else EngineError(told.error)
        elif told.payload:
            found = reset_outcome_decoder.decode(told.payload)
            operation.forgotten += found.forgotten
            operation.held += found.held

    # --- step by step --------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Takes the steps that are due."""
        while (operation := self._now or self._start_next()) is not None:
            if operation.draining and self._group.num_held:
                return
            operation.draining = False
            if operation.awaited:
                return
            self._step(operation)

    def _start_next(self) -> _Operation | None:
        while self._queue:
            operation = self._queue.popleft()
            try:
                target = operation.change(self.activity)
            except UserError as error:
                operation.done(error)
                continue
            operation.before = self.activity
            if target != self.activity:
                operation.steps.extend(self.activity.steps_to(target))
            if operation.reset:
                operation.steps.append(None)
            if not target.runs:  # nobody is given a request from now on
                self.activity = self.activity.pause()
                operation.draining = operation.mode == "wait"
                if operation.mode == "abort":
                    self._group.abort_all()
            self._now = operation
            return operation
        return None

    def _step(self, operation: _Operation) -> None:
        if operation.problem is not None and operation.failure is None:
            operation.failure, operation.problem = operation.problem, None
            operation.steps = deque([operation.before])
        if not operation.steps:
            self.activity = self._said
            self._end(operation, operation.failure or operation.found)
            return
        step = operation.steps.popleft()
        if step is not None:
            self._said = step
        for number in list(self._group.members()):
            self._ask(number, operation, step)

    def _ask(self, number: int, operation: _Operation | None, step: Activity | None) -> None:
        question = next(self._ids)
        self._asked[question] = (number, operation)
        if operation is not None:
            operation.awaited.add(question)
        running = operation is not None and operation.running
        self._group.tell(number, ResetPrefixCache(question, running) if step is None else SetActivity(question, step))

    def _end(self, operation: _Operation, outcome: bytes | ShoalError) -> None:
        self._now = None
        operation.done(outcome)


def _operation_of(wanted: Operation, done: Done) -> _Operation:
    """
    Raises:
        ConfigError: there is no such operation, or none with such a mode, level or tag.
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
