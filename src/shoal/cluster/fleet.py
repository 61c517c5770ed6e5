"""All replicas behind one address: started, watched, brought back, added and removed while requests go on."""

import itertools
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from shoal import wire
from shoal.cluster.replica import close_all
from shoal.cluster.replicas import Member, ReplicaSet
from shoal.cluster.router import Room
from shoal.cluster.stats import carried, emptied
from shoal.cluster.supervisor import Restarts
from shoal.cluster.timers import Timers
from shoal.errors import ConfigError, EngineError, RequestError, ShoalError, UserError
from shoal.observe.logging import get_logger
from shoal.protocols import Recorder
from shoal.transport.channel import wait
from shoal.transport.waker import Waker

log = get_logger("fleet")

_LEAVE_S = 5.0  # for a replica that was taken out to end by itself
_LOOK_S = 0.1  # how often whoever is about to end is looked at
_FOREVER_S = 3600.0
_LISTEN_S = 0.5  # how often it is looked who has said something
_MOST_PASSED_S = 2.0  # between two such looks: beyond that this process itself was stopped
_USEFUL_S = 60.0  # a life in which it was ready for so long was of use
_TOKEN_BYTES = 4
_NAMED = 8  # replicas, in an error


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it has ended, and waits for its next start
    AWAITED = "awaited"  # another host starts it
    LEAVING = "leaving"
    FAILED = "failed"


class Arrival(Member, Protocol):
    """A replica that another host has started. `host` and `pid` are where it runs."""

    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class About:
    model: str
    tp: int
    pp: int


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_queued` requests may wait for a replica, each for `max_wait` seconds; a request may take `timeout` seconds
    in all. A replica may be started again `max_restarts` times within an hour, and has `start_timeout` for it; one that
    has requests and says nothing for `answer_timeout` is lost. Replicas were planned for `max_model_len` tokens of a
    prompt and its output; what they hold may be less."""

    max_queued: int
    max_wait: float | None
    timeout: float | None
    max_restarts: int
    start_timeout: float
    answer_timeout: float = float("inf")
    max_model_len: int = 0


@dataclass(slots=True)
class _Slot:
    """One number's replica, through all its lives."""

    number: int
    local: bool
    restarts: Restarts
    state: State
    since: float
    member: Member | None = None
    host: str = ""
    pid: int = 0
    error: ShoalError | None = None  # its last end
    next_start: float = 0.0
    was_ready: bool = False
    past: wire.EngineStats | None = None  # counters of its former lives
    before: wire.EngineStats | None = None  # ... but for the last one
    returning: bool = False  # the engine of the last life is back, with its own counters
    first: wire.EngineStats | None = None  # what it said when it was ready
    latest: wire.EngineStats | None = None  # of this life
    words: int = 0  # that it had said when it was looked at last
    quiet: float = 0.0  # seconds since then, with requests

    @property
    def stats(self) -> wire.EngineStats | None:
        if self.latest is None:
            return self.past
        return self.latest if self.past is None else carried(self.past, self.latest)


class Fleet:
    """What one engine is to its client, whose replicas come back. Not thread-safe, but for `wake` and `arrive`.

    Requests wait while no replica is there. A replica that ends is started again, by the rule of `Restarts`; those of
    other hosts are awaited. With none left that can come back, what waits ends with the causes, and so does what comes.

    All requests are cut to one length, which all replicas hold, so that each ends at the same token wherever it runs
    and goes on. It is what those hold that are ready first; one that holds less is not taken in later.
    """

    def __init__(
        self,
        launch: Callable[[int, int], Member],
        room: Callable[[wire.EngineStats], Room],
        *,
        about: About,
        limits: Limits,
        local: Sequence[int],
        awaited: Sequence[int] = (),
        elsewhere: Container[int] = (),
        together: bool = False,
        recorder: Recorder | None = None,
        on_close: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`launch(number, generation)` starts a replica of this host; replicas that compute `together` have the same
        generation, a new one whenever they are started anew. `room` says how much one can use. The numbers `elsewhere`
        are taken by replicas that are no part of this fleet."""
        self._launch = launch
        self._room = room
        self._about = about
        self._limits = limits
        self._together = together
        self._elsewhere = elsewhere
        self._clock = clock
        self._began = clock()
        self._generation = 0
        self._slots: dict[int, _Slot] = {}
        self._pasts: dict[int, wire.EngineStats] = {}  # counters of those that were taken out
        self._length: int | None = None  # tokens of a prompt and its output
        self._has_started = False
        self._looked = self._began
        self._ending: list[tuple[float, Member]] = []  # with the time to which each may end by itself
        self._arrivals: deque[tuple[int, Arrival]] = deque()
        self._arrivals_lock = threading.Lock()
        self._sources: list[Any] = []  # what else is waited for
        self._waker = Waker()
        self._accepting = True
        self._failure = ""
        self._fatal: ShoalError | None = None
        self._closed = False
        self._set = ReplicaSet(
            {},
            {},
            together=together,
            on_close=on_close,
            wait_for=self._wait_for_any,
            on_loss=self._lost,
            recorder=recorder,
        )
        self._deadlines = Timers(self._set.is_open)
        self._patience = Timers(self._set.is_new)  # how long requests wait for a replica
        for number in awaited:
            self._add_slot(number, local=False)
        for slot in [self._add_slot(number, local=True) for number in local]:
            self._start(slot)

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: wire.EngineRequest) -> None:
        """Takes a request over. One that can't be taken ends at once, with the reason in its update.

        Raises:
            RequestError: its number is in use.
        """
        now = self._clock()
        request = wire.replace(request, arrival=request.arrival or now)
        objection = self._objection(request)
        if objection is not None:
            self._set.reject(request, *objection)
            return
        try:
            request = self._cut(request)
        except RequestError as error:
            self._set.reject(request, str(error), wire.Refusal.INVALID)
            return
        deadline = float("inf") if request.deadline is None else request.deadline
        if self._limits.timeout is not None:
            deadline = min(deadline, request.arrival + self._limits.timeout)
        self._set.add(wire.replace(request, deadline=None))  # it is kept here: another host's clock shows another time
        if self._set.is_new(request.seq) and self._set.num_waiting > self._limits.max_queued:
            most = f"{self._limits.max_queued} requests wait already (--max-queued-requests): come again later"
            self._set.refuse(request.seq, most, wire.Refusal.FULL)
            return
        if deadline < float("inf"):
            self._deadlines.add(deadline, request.seq)
        if self._limits.max_wait is not None:
            self._patience.add(now + self._limits.max_wait, request.seq)

    def _objection(self, request: wire.EngineRequest) -> tuple[str, wire.Refusal] | None:
        """Why a request is not taken, whatever else waits."""
        if self._failure:
            return self._failure, wire.Refusal.LOST
        if not self._accepting:
            return "the server is about to end and takes no new requests", wire.Refusal.CLOSING
        if request.replica < 0:
            return None
        slot = self._slots.get(request.replica)
        if slot is None or slot.state is State.LEAVING:
            return f"there is no replica {request.replica}; known are {self._known()}", wire.Refusal.INVALID
        if slot.state is State.FAILED:
            return f"replica {slot.number} is not started again: {slot.error}", wire.Refusal.LOST
        return None

    def _cut(self, request: wire.EngineRequest) -> wire.EngineRequest:
        """
        Raises:
            RequestError: no replica holds its prompt and a token.
        """
        if self._length is None:
            return request
        prompt_len = request.prompt_len or len(request.tokens) // _TOKEN_BYTES
        if prompt_len >= self._length:
            raise RequestError(
                f"the prompt has {prompt_len} tokens, and with its output it may have {self._length}: shorten it, or "
                "give the replicas more memory for their KV caches"
            )
        return wire.replace(request, max_tokens=min(request.max_tokens, self._length - prompt_len))

    def refuse(self, seq: int, why: str) -> bool:
        """Ends a request that can't be served; False if there is none of that number."""
        found = self._set.is_open(seq)
        self._set.refuse(seq, why, wire.Refusal.FAILED)
        return found

    def _known(self) -> str:
        numbers = sorted(slot.number for slot in self._slots.values() if slot.state is not State.LEAVING)
        return ", ".join([*map(str, numbers[:_NAMED]), *(["..."] if len(numbers) > _NAMED else [])])

    def abort(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        self._set.abort(seqs, stopped=stopped)

    def updates(self, timeout: float) -> list[wire.SeqUpdate]:
        """Drives everything: waits for replicas, starts those that are due, ends requests whose time is up."""
        self._tick()
        updates = self._set.updates(min(timeout, self._pause()))
        self._welcome()
        self._has_started = self._has_started or self._are_all_up()
        return updates

    def close(self) -> None:
        """Ends all replicas. Idempotent, never raises."""
        self._closed = True
        self._set.close()
        members = [slot.member for slot in self._slots.values() if slot.member is not None]
        with self._arrivals_lock:
            members += [member for _, member in self._arrivals]
            self._arrivals.clear()
        close_all([*members, *(member for _, member in self._ending)])
        self._waker.close()

    def audit(self) -> None:
        """Holds the books against each other.

        Raises:
            EngineError: they differ, or something is left of requests that have ended.
        """
        self._set.audit()
        self._deadlines.clean()
        self._patience.clean()
        if not self.num_unfinished and (self._set.num_waiting or len(self._deadlines) or len(self._patience)):
            raise EngineError("something is left of requests that have ended")

    # --- what a server asks and says -------------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        return self._set.num_unfinished

    @property
    def fatal(self) -> ShoalError | None:
        """Why no replica is left that could come back; None while one can."""
        return self._fatal

    @property
    def any_ready(self) -> bool:
        return any(slot.state is State.READY for slot in self._slots.values())

    @property
    def started(self) -> bool:
        """Can requests be served, by every replica of this host?

        Raises:
            UserError, EngineError: one of them has never been ready, and will not be, before all were up for the
                first time; or none is left at all.
        """
        if self._fatal is not None:
            raise self._fatal
        local = [slot for slot in self._slots.values() if slot.local and slot.state is not State.LEAVING]
        for slot in [] if self._has_started else local:
            if slot.state is State.FAILED and not slot.was_ready and slot.error is not None:
                raise slot.error
        return self.any_ready and all(slot.state in (State.READY, State.FAILED) for slot in local)

    def _are_all_up(self) -> bool:
        local = [slot for slot in self._slots.values() if slot.local and slot.state is not State.LEAVING]
        return self.any_ready and all(slot.was_ready for slot in local)

    def status(self) -> wire.FleetStatus:
        now = self._clock()
        return wire.FleetStatus(
            model=self._about.model,
            tp=self._about.tp,
            pp=self._about.pp,
            replicas=tuple(self._state_of(self._slots[number], now) for number in sorted(self._slots)),
            queued=self._set.num_waiting,
            replays=self._set.replays,
            accepting=self._accepting and not self._failure,
            uptime_s=now - self._began,
            failure=self._failure,
            max_model_len=self._length or 0,
        )

    def _state_of(self, slot: _Slot, now: float) -> wire.ReplicaState:
        self._read_snapshot(slot)
        return wire.ReplicaState(
            number=slot.number,
            state=slot.state.value,
            host=slot.host,
            pid=slot.pid,
            since_s=now - slot.since,
            restarts=slot.restarts.count,
            cause="" if slot.error is None else str(slot.error),
            held=self._set.held(slot.number),
            stats=slot.stats,
        )

    def drain(self) -> None:
        """Takes nothing new."""
        self._accepting = False

    def scale(self, count: int) -> None:
        """Has `count` replicas from now on: starts more on this host, or takes out those with the highest numbers,
        whose requests go on at the others. Those that have failed for good make room for new ones.

        Raises:
            ConfigError: replicas that compute together can't be more or fewer, or there would be none.
            UserError, EngineError: none is left.
        """
        if self._fatal is not None:
            raise self._fatal
        if count < 1:
            raise ConfigError(f"there must be at least one replica, got {count}")
        slots = [self._slots[number] for number in sorted(self._slots)]
        staying = [slot for slot in slots if slot.state not in (State.LEAVING, State.FAILED)]
        if self._together and count != len(staying):
            raise ConfigError("replicas that share experts all start and end together: their number stays as it is")
        for slot in staying[count:]:
            self._take_out(slot)
        for slot in slots:
            if slot.state is State.FAILED:
                self._forget(slot)
        unused = (each for each in itertools.count() if each not in self._slots and each not in self._elsewhere)
        for number in itertools.islice(unused, max(0, count - len(staying))):
            log.info("replica %d is added", number)
            self._start(self._add_slot(number, local=True))

    def _take_out(self, slot: _Slot) -> None:
        log.info("replica %d is taken out; its %d requests go on elsewhere", slot.number, self._set.held(slot.number))
        if slot.state is State.READY:
            self._set.retire(slot.number)
        self._refuse_pinned(slot, f"replica {slot.number}, the only one that may run it, was taken out")
        if slot.member is None:
            self._forget(slot)
            return
        self._enter(slot, State.LEAVING)
        self._dismiss(slot.member)

    def _dismiss(self, member: Member) -> None:
        member.dismiss()
        self._ending.append((self._clock() + _LEAVE_S, member))

    def _refuse_pinned(self, slot: _Slot, why: str) -> None:
        for seq in self._set.waiting_for(slot.number):
            self._set.refuse(seq, why, wire.Refusal.LOST)

    def arrive(self, number: int, member: Arrival) -> None:
        """A replica that another host has started, and that says by itself when it is ready. From any thread."""
        with self._arrivals_lock:
            self._arrivals.append((number, member))
        self.wake()

    def wake(self) -> None:
        """Ends the wait of `updates`. From any thread."""
        self._waker.wake()

    def watch(self, source: Any) -> None:
        """`updates` returns when this has something to read, too."""
        self._sources.append(source)

    def unwatch(self, source: Any) -> None:
        if source in self._sources:
            self._sources.remove(source)

    # --- the lives of replicas ---------------------------------------------------------------------------------------

    def _add_slot(self, number: int, *, local: bool) -> _Slot:
        state = State.STARTING if local else State.AWAITED
        slot = self._slots[number] = _Slot(number, local, Restarts(self._limits.max_restarts), state, self._clock())
        slot.past = self._pasts.pop(number, None)
        return slot

    def _forget(self, slot: _Slot) -> None:
        """Its counters are kept: they go on if a replica of its number is added again."""
        self._read_snapshot(slot)
        if slot.stats is not None:
            self._pasts[slot.number] = emptied(slot.stats)
        del self._slots[slot.number]

    def _start(self, slot: _Slot) -> None:
        self._set.expect(slot.number)
        self._enter(slot, State.STARTING)
        slot.host = socket.gethostname()
        try:
            slot.member = self._launch(slot.number, self._generation)
            slot.pid = getattr(slot.member, "pid", os.getpid())
        except ShoalError as error:
            self._end_life(slot, error)
        except OSError as error:  # no memory for a process, no descriptors
            self._end_life(slot, EngineError(f"replica {slot.number}: can't be started: {error}"))

    def _tick(self) -> None:
        now = self._clock()
        self._take_arrivals()
        self._start_due(now)
        self._lose_silent(now)
        for seq in self._deadlines.due(now):
            self._set.refuse(seq, "the request was not finished by its deadline", wire.Refusal.LATE)
        for seq in self._patience.due(now):
            waited = f"the request waited {self._limits.max_wait:g} s for a replica (--max-queue-wait)"
            self._set.refuse(seq, waited, wire.Refusal.LATE)
        for entry in [entry for entry in self._ending if entry[0] <= now or entry[1].has_ended]:
            self._ending.remove(entry)
            entry[1].abandon()
            for slot in [slot for slot in self._slots.values() if slot.member is entry[1]]:
                self._forget(slot)

    def _lose_silent(self, now: float) -> None:
        """Replicas that have requests and say nothing: a busy engine says every now and then how it does. Time in which
        this process was stopped itself, and heard nobody, does not count."""
        if now - self._looked < _LISTEN_S:
            return
        passed, self._looked = min(now - self._looked, _MOST_PASSED_S), now
        for slot in list(self._slots.values()):
            member, held = slot.member, self._set.held(slot.number)
            if slot.state is not State.READY or member is None:
                continue
            if not held or member.words != slot.words:
                slot.words, slot.quiet = member.words, 0.0
                continue
            slot.quiet += passed
            if slot.quiet > self._limits.answer_timeout:
                silent = f"{member.name} has {held} requests and has said nothing for {slot.quiet:.0f} s"
                self._set.lose(slot.number, EngineError(f"{silent} (--step-timeout): it hangs"))

    def _start_due(self, now: float) -> None:
        for slot in list(self._slots.values()):
            late = now - slot.since > self._limits.start_timeout
            if slot.state is State.STARTING and slot.first is None and late:
                self._kill(slot, EngineError(f"replica {slot.number}: not ready within its time to start"))
        if self._together:
            self._start_together(now)
            return
        for slot in list(self._slots.values()):
            if slot.state is State.RESTARTING and slot.next_start <= now:
                self._start(slot)

    def _start_together(self, now: float) -> None:
        """One that has ended takes the others along; when all are down, and time is up for each, all start."""
        local = [slot for slot in self._slots.values() if slot.local]
        down = [slot for slot in local if slot.state is State.RESTARTING]
        if not down:
            return
        for slot in local:
            if slot.state is State.STARTING:
                self._kill(slot, EngineError(f"replica {down[0].number} has ended, without which it can't start"))
        if all(slot.state is State.RESTARTING and slot.next_start <= now for slot in local):
            self._generation += 1
            for slot in local:
                self._start(slot)

    def _kill(self, slot: _Slot, error: EngineError) -> None:
        if slot.member is not None:
            slot.member.abandon()
        self._end_life(slot, error)

    def _take_arrivals(self) -> None:
        with self._arrivals_lock:
            arrivals, self._arrivals = list(self._arrivals), deque()
        for number, member in arrivals:
            slot = self._slots.get(number)
            if slot is None or slot.state is not State.AWAITED:
                log.warning("replica %d of %s is not awaited, and sent away", number, member.host)
                self._dismiss(member)
                continue
            self._set.expect(number)
            slot.restarts.count += slot.was_ready  # by its own host, or it was cut off for a while
            slot.returning = slot.was_ready and (slot.host, slot.pid) == (member.host, member.pid)
            slot.member, slot.host, slot.pid = member, member.host, member.pid
            self._enter(slot, State.STARTING)

    def _welcome(self) -> None:
        """Replicas that have become ready."""
        for slot in list(self._slots.values()):
            if slot.state is not State.STARTING or slot.member is None:
                continue
            try:
                stats = slot.member.ready(0)
            except ShoalError as error:
                slot.member.abandon()
                self._end_life(slot, error)
                continue
            if stats is not None:
                slot.first = slot.latest = stats
        if self._length is None:
            self._decide_length()
        if self._length is not None:
            for slot in list(self._slots.values()):
                if slot.state is State.STARTING and slot.member is not None and slot.first is not None:
                    self._admit(slot, slot.member, slot.first, self._length)

    def _decide_length(self) -> None:
        """If a KV cache holds less than was planned, those that start with it may hold still less: they are waited
        for."""
        starting = [slot for slot in self._slots.values() if slot.state in (State.STARTING, State.AWAITED)]
        lengths = [slot.first.max_model_len for slot in starting if slot.first is not None]
        awaited = [slot for slot in starting if slot.first is None and (slot.local or self._together)]
        if not lengths or (awaited and min(lengths) < self._limits.max_model_len):
            return
        self._length = min(lengths)
        if self._length < self._limits.max_model_len:
            log.warning(
                "requests may have %d tokens, not %d: the KV cache holds no more",
                *(self._length, self._limits.max_model_len),
            )
        self._set.bound(self._cut)

    def _admit(self, slot: _Slot, member: Member, stats: wire.EngineStats, length: int) -> None:
        if stats.max_model_len < length:
            if slot.local:
                member.abandon()
            else:
                self._dismiss(member)
            shorter = f"{member.name} holds requests of {stats.max_model_len} tokens, and {length} are served"
            error = EngineError(f"{shorter}: start the server with --max-model-len {stats.max_model_len}")
            log.error("%s", error)
            self._end_life(slot, error)
            return
        took = self._clock() - slot.since
        log.info("replica %d is ready after %.2f s: %d KV blocks", slot.number, took, stats.num_blocks)
        if slot.returning:
            slot.past, slot.returning = slot.before, False
        slot.was_ready = True
        slot.words, slot.quiet = member.words, 0.0
        self._enter(slot, State.READY)
        self._set.admit(slot.number, member, self._room(stats))

    def _lost(self, number: int, error: EngineError) -> None:
        self._end_life(self._slots[number], error)

    def _end_life(self, slot: _Slot, error: ShoalError) -> None:
        """A replica has ended, or could not be started."""
        self._read_snapshot(slot)
        if slot.latest is not None and slot.stats is not None and not slot.returning:
            slot.before, slot.past = slot.past, emptied(slot.stats)
        slot.first = slot.latest = slot.member = None
        slot.error = error
        if self._closed:
            return
        if not slot.local:
            self._enter(slot, State.AWAITED)
            return
        pause = self._pause_before_next(slot, error)
        if pause is None:
            self._fail(slot, error)
            return
        log.warning("replica %d is started again %s", slot.number, f"in {pause:g} s" if pause else "at once")
        slot.next_start = self._clock() + pause
        self._enter(slot, State.RESTARTING)

    def _pause_before_next(self, slot: _Slot, error: ShoalError) -> float | None:
        """Before its next start; None: there is none. What the user must mend, or has never worked, will not mend
        itself."""
        if isinstance(error, UserError) or not self._has_worked(slot):
            return None
        now = self._clock()
        useful = any(
            self._set.drew(each.number) or (each.state is State.READY and now - each.since >= _USEFUL_S)
            for each in (self._slots.values() if self._together else [slot])
        )
        return slot.restarts.pause(now, useful=useful)

    def _has_worked(self, slot: _Slot) -> bool:
        return any(each.was_ready for each in (self._slots.values() if self._together else [slot]))

    def _fail(self, slot: _Slot, error: ShoalError) -> None:
        """A replica is not started again. With none left that can come back, nothing can be served any more."""
        why = slot.restarts.why_not if self._has_worked(slot) else "it has never been ready"
        log.error("%s; replica %d is not started again: %s", error, slot.number, why)
        self._enter(slot, State.FAILED)
        self._refuse_pinned(slot, f"replica {slot.number}, the only one that may run it, is not started again: {error}")
        slots = [each for each in self._slots.values() if each.state is not State.LEAVING]
        failed = [each for each in slots if each.state is State.FAILED]
        if self._fatal is not None or (len(failed) < len(slots) and not self._together):
            return
        causes = "; ".join(f"replica {each.number}: {each.error}" for each in failed)
        self._failure = f"no replica is left: {causes}" if len(slots) > 1 else str(error)
        users = [each.error for each in failed if isinstance(each.error, UserError)]
        self._fatal = type(users[0])(self._failure) if users else EngineError(self._failure)
        self._set.give_up(self._failure)

    def _enter(self, slot: _Slot, state: State) -> None:
        slot.state = state
        slot.since = self._clock()

    def _read_snapshot(self, slot: _Slot) -> None:
        if slot.first is not None and slot.member is not None and slot.member.snapshot is not None:
            slot.latest = slot.member.snapshot

    # --- waiting ------------------------------------------------------------------------------------------------------

    def _pause(self) -> float:
        """Seconds to the next thing that is due."""
        now = self._clock()
        times = [self._deadlines.next, self._patience.next]
        if self._fatal is None:
            times += [slot.next_start for slot in self._slots.values() if slot.state is State.RESTARTING]
        if self._ending:
            times.append(now + _LOOK_S)
        return max(0.0, min((time for time in times if time is not None), default=now + _FOREVER_S) - now)

    def _wait_for_any(self, replicas: Sequence[Member], timeout: float) -> None:
        starting = [slot.member for slot in self._slots.values() if slot.state is State.STARTING]
        channels: list[Any] = [member.channel for member in (*replicas, *starting) if member is not None]
        channels += [self._waker, *(source for source in self._sources if source.fileno() >= 0)]
        wait(channels, timeout)
        self._waker.quiet()
