"""Replicas that come back: started, welcomed, given up, added and taken out."""

import itertools
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Protocol

from shoal.cluster.limits import FleetLimits
from shoal.cluster.members.replica import close_all
from shoal.cluster.members.restarts import Restarts
from shoal.cluster.members.slot import Slot, SlotState
from shoal.cluster.replica_set import ReplicaClient, ReplicaSet
from shoal.cluster.routing.router import ReplicaCapacity
from shoal.cluster.stats import emptied
from shoal.errors import ConfigError, EngineError, ShoalError, UserError
from shoal.log import get_logger
from shoal.wire.engine import EngineStats, RefusalKind
from shoal.wire.fleet import ReplicaStatus

log = get_logger("fleet")

_LEAVE_S = 5.0  # for a replica that was taken out to end by itself
_LOOK_S = 0.1  # how often whoever is about to end is looked at
_LISTEN_S = 0.5  # how often it is looked who has said something
_MOST_PASSED_S = 2.0  # between two such looks: beyond that this process itself was stopped
_USEFUL_S = 60.0  # a life in which it was ready for so long was of use
_NAMED = 8  # replicas, in an error


class RemoteReplica(ReplicaClient, Protocol):
    """A replica that another host has started. `host` and `pid` are where it runs."""

    host: str
    pid: int


class Lives:
    """The replicas of a fleet, each through all its lives. A part of `Fleet`, whose clock and thread it shares.

    One that ends is started again, by the rule of `Restarts`; those of other hosts are awaited. With none left that can
    come back, all that waits in the set is given up. One is admitted to the set when it is ready, and `on_length` was
    told how many tokens all that are served may have: what those hold that are ready first. One that holds less is
    not taken in later.
    """

    def __init__(
        self,
        launch: Callable[[int, int], ReplicaClient],
        room: Callable[[EngineStats], ReplicaCapacity],
        members: ReplicaSet,
        *,
        limits: FleetLimits,
        local: Sequence[int],
        awaited: Sequence[int],
        elsewhere: Container[int],
        together: bool,
        on_length: Callable[[int], object],
        clock: Callable[[], float],
    ) -> None:
        """As of a Fleet. Nothing is started before `begin`."""
        self._launch = launch
        self._room = room
        self._set = members
        self._limits = limits
        self._elsewhere = elsewhere
        self._together = together
        self._on_length = on_length
        self._clock = clock
        self._generation = 0
        self._slots: dict[int, Slot] = {}
        self._pasts: dict[int, EngineStats] = {}  # counters of those that were taken out
        self._length: int | None = None  # tokens of a prompt and its output
        self._has_started = False
        self._listened = clock()
        self._ending: list[tuple[float, ReplicaClient]] = []  # with the time to which each may end by itself
        self._arrivals: deque[tuple[int, RemoteReplica]] = deque()
        self._arrivals_lock = threading.Lock()
        self._failure = ""
        self._fatal: ShoalError | None = None
        self._closed = False
        for number in awaited:
            self._add_slot(number, local=False)
        for number in local:
            self._add_slot(number, local=True)

    def begin(self) -> None:
        """Starts the replicas of this host."""
        for slot in [slot for slot in self._slots.values() if slot.local]:
            self._start(slot)

    def closing(self) -> None:
        """Nothing is started any more."""
        self._closed = True

    def close(self) -> None:
        """Ends all replicas. Idempotent, never raises."""
        self._closed = True
        members = [slot.member for slot in self._slots.values() if slot.member is not None]
        with self._arrivals_lock:
            members += [member for _, member in self._arrivals]
            self._arrivals.clear()
        close_all([*members, *(member for _, member in self._ending)])

    # --- what is asked -------------------------------------------------------------------------------------------

    @property
    def fatal(self) -> ShoalError | None:
        """Why no replica is left that could come back; None while one can."""
        return self._fatal

    @property
    def failure(self) -> str:
        """The same in words; empty while one can."""
        return self._failure

    @property
    def any_ready(self) -> bool:
        return any(slot.state is SlotState.READY for slot in self._slots.values())

    @property
    def started(self) -> bool:
        """Can requests be served, by every replica of this host but for those that were added and have not come up yet?

        Raises:
            UserError, EngineError: one of them has never been ready, and will not be, before all were up for the
                first time; or none is left at all.
        """
        if self._fatal is not None:
            raise self._fatal
        local = self._staying_here()
        for slot in [] if self._has_started else local:
            if slot.state is SlotState.FAILED and not slot.was_ready and slot.error is not None:
                raise slot.error
        return self.any_ready and all(
            slot.state in (SlotState.READY, SlotState.FAILED)
            or (self._has_started and slot.state is SlotState.STARTING and not slot.was_ready)
            for slot in local
        )

    def _staying_here(self) -> list[Slot]:
        return [slot for slot in self._slots.values() if slot.local and slot.state is not SlotState.LEAVING]

    def states(self) -> tuple[ReplicaStatus, ...]:
        now = self._clock()
        return tuple(self._slots[number].shown(now, self._set.held(number)) for number in sorted(self._slots))

    def objection(self, number: int) -> tuple[str, RefusalKind] | None:
        """Why a request that names this replica can't be served."""
        slot = self._slots.get(number)
        if slot is None or slot.state is SlotState.LEAVING:
            return f"there is no replica {number}; known are {self._known()}", RefusalKind.INVALID
        if slot.state is SlotState.FAILED:
            return f"replica {number} is not started again: {slot.error}", RefusalKind.LOST
        return None

    def most_held(self, number: int) -> int | None:
        """Requests that replicas hold at a time once all are up, or the one of this number (-1: any may). None: no
        replica has been ready that could say it."""
        slots = [self._slots[number]] if number >= 0 else list(self._slots.values())
        known = [self._room(each.first).requests for each in self._slots.values() if each.first is not None]
        gone = (SlotState.FAILED, SlotState.LEAVING)
        return max(known) * sum(each.state not in gone for each in slots) if known else None

    def _known(self) -> str:
        numbers = sorted(slot.number for slot in self._slots.values() if slot.state is not SlotState.LEAVING)
        return ", ".join([*map(str, numbers[:_NAMED]), *(["..."] if len(numbers) > _NAMED else [])])

    def starting(self) -> list[ReplicaClient]:
        """Replicas that say themselves when they are ready."""
        found = [slot.member for slot in self._slots.values() if slot.state is SlotState.STARTING]
        return [member for member in found if member is not None]

    @property
    def next_due(self) -> float | None:
        """When `tick` has something to do, if nobody says anything before."""
        times = [self._clock() + _LOOK_S] if self._ending else []
        if self._fatal is None:
            times += [slot.next_start for slot in self._slots.values() if slot.state is SlotState.RESTARTING]
        return min(times, default=None)

    # --- as time passes --------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Whose time has come is started, given up, or forgotten."""
        self._take_arrivals()
        self._start_due(now)
        self._lose_silent(now)
        self._end_leavers(now)

    def _take_arrivals(self) -> None:
        with self._arrivals_lock:
            arrivals, self._arrivals = list(self._arrivals), deque()
        for number, member in arrivals:
            slot = self._slots.get(number)
            if slot is None or slot.state is not SlotState.AWAITED:
                log.warning("replica %d of %s is not awaited, and sent away", number, member.host)
                self._dismiss(member)
                continue
            self._set.expect(number)
            slot.take_over(member, member.host, member.pid)
            slot.enter(SlotState.STARTING, self._clock())

    def _start_due(self, now: float) -> None:
        for slot in list(self._slots.values()):
            late = now - slot.since > self._limits.start_timeout
            if slot.state is SlotState.STARTING and slot.first is None and late:
                self._kill(slot, EngineError(f"replica {slot.number}: not ready within its time to start"))
        if self._together:
            self._start_together(now)
            return
        for slot in list(self._slots.values()):
            if slot.state is SlotState.RESTARTING and slot.next_start <= now:
                self._start(slot)

    def _start_together(self, now: float) -> None:
        """One that has ended takes the others along; when all are down, and time is up for each, all start."""
        local = [slot for slot in self._slots.values() if slot.local]
        down = [slot for slot in local if slot.state is SlotState.RESTARTING]
        if not down:
            return
        for slot in local:
            if slot.state is SlotState.STARTING:
                self._kill(slot, EngineError(f"replica {down[0].number} has ended, without which it can't start"))
        if all(slot.state is SlotState.RESTARTING and slot.next_start <= now for slot in local):
            self._generation += 1
            for slot in local:
                self._start(slot)

    def _lose_silent(self, now: float) -> None:
        """Replicas that have requests and say nothing: a busy engine says every now and then how it does. Time in which
        this process was stopped itself, and heard nobody, does not count."""
        if now - self._listened < _LISTEN_S:
            return
        passed, self._listened = min(now - self._listened, _MOST_PASSED_S), now
        for slot in list(self._slots.values()):
            if slot.state is not SlotState.READY or slot.member is None:
                continue
            held = self._set.held(slot.number) if self._set.activity.runs else 0  # else it has nothing to say
            quiet = slot.listen(slot.member, held=held, passed=passed)
            if quiet > self._limits.answer_timeout:
                silent = f"{slot.member.name} has {held} requests and has said nothing for {quiet:.0f} s"
                self._set.lose(slot.number, EngineError(f"{silent} (--step-timeout): it hangs"))

    def _end_leavers(self, now: float) -> None:
        for entry in [entry for entry in self._ending if entry[0] <= now or entry[1].has_ended]:
            self._ending.remove(entry)
            entry[1].abandon()
            for slot in [slot for slot in self._slots.values() if slot.member is entry[1]]:
                self._forget(slot)

    def welcome(self) -> None:
        """Replicas that have become ready are admitted."""
        for slot in list(self._slots.values()):
            if slot.state is not SlotState.STARTING or slot.member is None:
                continue
            try:
                stats = slot.member.ready(0)
            except ShoalError as error:
                slot.member.abandon()
                self._end(slot, error)
                continue
            if stats is not None:
                slot.say_ready(stats)
        if self._length is None:
            self._decide_length()
        if self._length is not None:
            for slot in list(self._slots.values()):
                if slot.state is SlotState.STARTING and slot.member is not None and slot.first is not None:
                    self._admit(slot, slot.member, slot.first, self._length)
        if not self._has_started:
            self._has_started = self.any_ready and all(slot.was_ready for slot in self._staying_here())

    def _decide_length(self) -> None:
        """If a KV cache holds less than was planned, those that start with it may hold still less: they are waited
        for."""
        starting = [slot for slot in self._slots.values() if slot.state in (SlotState.STARTING, SlotState.AWAITED)]
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
        self._on_length(self._length)

    def _admit(self, slot: Slot, member: ReplicaClient, stats: EngineStats, length: int) -> None:
        if stats.max_model_len < length:
            if slot.local:
                member.abandon()
            else:
                self._dismiss(member)
            shorter = f"{member.name} holds requests of {stats.max_model_len} tokens, and {length} are served"
            error = EngineError(f"{shorter}: start the server with --max-model-len {stats.max_model_len}")
            log.error("%s", error)
            self._end(slot, error)
            return
        now = self._clock()
        log.info("replica %d is ready after %.2f s: %d KV blocks", slot.number, now - slot.since, stats.num_blocks)
        slot.admit(member)
        slot.enter(SlotState.READY, now)
        self._set.admit(slot.number, member, self._room(stats), stats.activity)

    # --- a life begins and ends ------------------------------------------------------------------------------------

    def _add_slot(self, number: int, *, local: bool) -> Slot:
        state = SlotState.STARTING if local else SlotState.AWAITED
        restarts = Restarts(self._limits.max_restarts)
        slot = Slot(number, local, restarts, state, self._clock(), past=self._pasts.pop(number, None))
        self._slots[number] = slot
        return slot

    def _forget(self, slot: Slot) -> None:
        """Its counters are kept: they go on if a replica of its number is added again."""
        stats = slot.stats
        if stats is not None:
            self._pasts[slot.number] = emptied(stats)
        del self._slots[slot.number]

    def _start(self, slot: Slot) -> None:
        self._set.expect(slot.number)
        slot.enter(SlotState.STARTING, self._clock())
        slot.host = socket.gethostname()
        try:
            slot.member = self._launch(slot.number, self._generation)
            slot.pid = getattr(slot.member, "pid", os.getpid())
        except ShoalError as error:
            self._end(slot, error)
        except OSError as error:  # no memory for a process, no descriptors
            self._end(slot, EngineError(f"replica {slot.number}: can't be started: {error}"))

    def _kill(self, slot: Slot, error: EngineError) -> None:
        if slot.member is not None:
            slot.member.abandon()
        self._end(slot, error)

    def lost(self, number: int, error: EngineError) -> None:
        """A replica of the set has ended."""
        self._end(self._slots[number], error)

    def _end(self, slot: Slot, error: ShoalError) -> None:
        """A replica has ended, or could not be started."""
        slot.end(error)
        if self._closed:
            return
        now = self._clock()
        if not slot.local:
            slot.enter(SlotState.AWAITED, now)
            return
        pause = self._pause_before_next(slot, error, now)
        if pause is None:
            self._fail(slot, error)
            return
        log.warning("replica %d is started again %s", slot.number, f"in {pause:g} s" if pause else "at once")
        slot.next_start = now + pause
        slot.enter(SlotState.RESTARTING, now)

    def _pause_before_next(self, slot: Slot, error: ShoalError, now: float) -> float | None:
        """Before its next start; None: there is none. What the user must mend, or has never worked, will not mend
        itself."""
        if isinstance(error, UserError) or not self._has_worked(slot):
            return None
        useful = any(
            self._set.drew(each.number) or (each.state is SlotState.READY and now - each.since >= _USEFUL_S)
            for each in self._companions(slot)
        )
        return slot.restarts.pause(now, useful=useful)

    def _has_worked(self, slot: Slot) -> bool:
        return any(each.was_ready for each in self._companions(slot))

    def _companions(self, slot: Slot) -> list[Slot]:
        """Those that live and end together with it, and itself."""
        return list(self._slots.values()) if self._together else [slot]

    def _fail(self, slot: Slot, error: ShoalError) -> None:
        """A replica is not started again. With none left that can come back, nothing can be served any more."""
        why = slot.restarts.why_not if self._has_worked(slot) else "it has never been ready"
        if isinstance(error, UserError):
            why = "that does not mend itself"
        log.error("%s; replica %d is not started again: %s", error, slot.number, why)
        slot.enter(SlotState.FAILED, self._clock())
        self._refuse_pinned(slot, f"replica {slot.number}, the only one that may run it, is not started again: {error}")
        slots = [each for each in self._slots.values() if each.state is not SlotState.LEAVING]
        failed = [each for each in slots if each.state is SlotState.FAILED]
        if self._fatal is not None or (len(failed) < len(slots) and not self._together):
            return
        causes = "; ".join(f"replica {each.number}: {each.error}" for each in failed)
        self._failure = f"no replica is left: {causes}" if len(slots) > 1 else str(error)
        users = [each.error for each in failed if isinstance(each.error, UserError)]
        self._fatal = type(users[0])(self._failure) if users else EngineError(self._failure)
        self._set.give_up(self._failure)

    def _refuse_pinned(self, slot: Slot, why: str) -> None:
        for seq in self._set.waiting_for(slot.number):
            self._set.refuse(seq, why, RefusalKind.LOST)

    # --- more and fewer --------------------------------------------------------------------------------------------

    def arrive(self, number: int, member: RemoteReplica) -> None:
        """From any thread; it is taken in at the next `tick`."""
        with self._arrivals_lock:
            self._arrivals.append((number, member))

    def scale(self, count: int) -> None:
        """As of a Fleet."""
        if self._fatal is not None:
            raise self._fatal
        if count < 1:
            raise ConfigError(f"there must be at least one replica, got {count}")
        slots = [self._slots[number] for number in sorted(self._slots)]
        staying = [slot for slot in slots if slot.state not in (SlotState.LEAVING, SlotState.FAILED)]
        if self._together and count != len(staying):
            raise ConfigError("replicas that share experts all start and end together: their number stays as it is")
        for slot in staying[count:]:
            self._take_out(slot)
        for slot in slots:
            if slot.state is SlotState.FAILED:
                self._forget(slot)
        unused = (each for each in itertools.count() if each not in self._slots and each not in self._elsewhere)
        for number in itertools.islice(unused, max(0, count - len(staying))):
            log.info("replica %d is added", number)
            self._start(self._add_slot(number, local=True))

    def _take_out(self, slot: Slot) -> None:
        log.info("replica %d is taken out; its %d requests go on elsewhere", slot.number, self._set.held(slot.number))
        if slot.state is SlotState.READY:
            self._set.retire(slot.number)
        self._refuse_pinned(slot, f"replica {slot.number}, the only one that may run it, was taken out")
        if slot.member is None:
            self._forget(slot)
            return
        slot.enter(SlotState.LEAVING, self._clock())
        self._dismiss(slot.member)

    def _dismiss(self, member: ReplicaClient) -> None:
        member.dismiss()
        self._ending.append((self._clock() + _LEAVE_S, member))
