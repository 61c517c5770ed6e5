"""The supervisor of a fleet's replicas: it starts, admits, restarts, adds and removes them."""

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
from shoal.cluster.members.supervised import RunState
from shoal.cluster.members.supervised_replica import SupervisedReplica
from shoal.cluster.replica_set import ReplicaClient, ReplicaSet
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.stats import emptied
from shoal.errors import ConfigError, EngineError, RequestError, ShoalError, UserError
from shoal.log import get_logger
from shoal.wire.engine import EngineStats, RefusalKind
from shoal.wire.fleet import ReplicaStatus

log = get_logger("fleet")

_LEAVE_S = 5.0  # for a replica that was taken out to end by itself
_LOOK_S = 0.1  # how often replicas that are about to end are looked at
_LISTEN_S = 0.5  # how often silent replicas are looked for
_MOST_PASSED_S = 2.0  # between two such looks: beyond that this process itself was stopped
_USEFUL_S = 60.0  # a run in which a replica was ready for so long was useful
_NAMED = 8  # replicas that an error names


class RemoteReplica(ReplicaClient, Protocol):
    """A replica that another host has started. `host` and `pid` are where it runs."""

    host: str
    pid: int


class ReplicaSupervisor:
    """Supervises the replicas of a fleet. A part of `Fleet`, whose clock and thread it shares.

    A replica that ends is started again by the rule of `Supervised`; those of other hosts are awaited. When no replica
    is left that can come back, all waiting requests of the set are given up. A replica is admitted to the set when it
    is ready and `on_length` was told how many tokens a request may have: as many as the first ready replicas hold. A
    replica that holds less is not admitted later.
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
        """Arguments are those of a Fleet. Nothing is started before `begin`."""
        self._launch = launch
        self._room = room
        self._set = members
        self._limits = limits
        self._elsewhere = elsewhere
        self._together = together
        self._on_length = on_length
        self._clock = clock
        self._generation = 0
        self._replicas: dict[int, SupervisedReplica] = {}
        self._pasts: dict[int, EngineStats] = {}  # counters of replicas that were taken out
        self._length: int | None = None  # tokens of a prompt and its output
        self._has_started = False
        self._listened = clock()
        self._ending: list[tuple[float, ReplicaClient]] = []  # until this time each may end by itself
        self._arrivals: deque[tuple[int, RemoteReplica]] = deque()
        self._arrivals_lock = threading.Lock()
        self._failure = ""
        self._fatal: ShoalError | None = None
        self._closed = False
        for number in awaited:
            self._add_replica(number, local=False)
        for number in local:
            self._add_replica(number, local=True)

    def begin(self) -> None:
        """Start the replicas of this host."""
        for replica in [replica for replica in self._replicas.values() if replica.local]:
            self._start(replica)

    def closing(self) -> None:
        """Start nothing any more."""
        self._closed = True

    def close(self) -> None:
        """End all replicas. Idempotent, never raises."""
        self._closed = True
        members = [replica.member for replica in self._replicas.values() if replica.member is not None]
        with self._arrivals_lock:
            members += [member for _, member in self._arrivals]
            self._arrivals.clear()
        close_all([*members, *(member for _, member in self._ending)])

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def fatal(self) -> ShoalError | None:
        """The reason why no replica is left that could come back; None while one can."""
        return self._fatal

    @property
    def failure(self) -> str:
        """The same reason in words; empty while a replica can come back."""
        return self._failure

    @property
    def any_ready(self) -> bool:
        return any(replica.state is RunState.READY for replica in self._replicas.values())

    @property
    def started(self) -> bool:
        """True if requests can be served by every replica of this host. Replicas that were added later and have not
        come up yet do not count.

        Raises:
            UserError, EngineError: a replica can't become ready, and not all have been ready once; or none is left.
        """
        if self._fatal is not None:
            raise self._fatal
        local = self._staying_here()
        for replica in [] if self._has_started else local:
            if replica.state is RunState.FAILED and not replica.was_ready and replica.error is not None:
                raise replica.error
        return self.any_ready and all(
            replica.state in (RunState.READY, RunState.FAILED)
            or (self._has_started and replica.state is RunState.STARTING and not replica.was_ready)
            for replica in local
        )

    def _staying_here(self) -> list[SupervisedReplica]:
        return [
            replica for replica in self._replicas.values() if replica.local and replica.state is not RunState.LEAVING
        ]

    def states(self) -> tuple[ReplicaStatus, ...]:
        now = self._clock()
        return tuple(self._replicas[number].status(now, self._set.held(number)) for number in sorted(self._replicas))

    def objection(self, number: int) -> tuple[RequestError | str, RefusalKind] | None:
        """Return the reason why a request that names this replica can't be served; None if it can."""
        replica = self._replicas.get(number)
        if replica is None or replica.state is RunState.LEAVING:
            why = f"there is no replica {number}; known are {self._known()}"
            return RequestError(why, "data_parallel_rank"), RefusalKind.INVALID
        if replica.state is RunState.FAILED:
            return f"replica {number} is not started again: {replica.error}", RefusalKind.LOST
        return None

    def most_held(self, number: int) -> int | None:
        """Return how many requests all replicas, or the one with this number (-1: all), hold at a time once they are
        up. None: that is not known before a replica was ready."""
        replicas = [self._replicas[number]] if number >= 0 else list(self._replicas.values())
        known = [self._room(each.first).requests for each in self._replicas.values() if each.first is not None]
        gone = (RunState.FAILED, RunState.LEAVING)
        return max(known) * sum(each.state not in gone for each in replicas) if known else None

    def _known(self) -> str:
        numbers = sorted(replica.number for replica in self._replicas.values() if replica.state is not RunState.LEAVING)
        return ", ".join([*map(str, numbers[:_NAMED]), *(["..."] if len(numbers) > _NAMED else [])])

    def starting(self) -> list[ReplicaClient]:
        """The replicas that will say when they are ready."""
        found = [replica.member for replica in self._replicas.values() if replica.state is RunState.STARTING]
        return [member for member in found if member is not None]

    @property
    def next_due(self) -> float | None:
        """The time at which `tick` has something to do; None: only when a replica says something."""
        times = [self._clock() + _LOOK_S] if self._ending else []
        if self._fatal is None:
            times += [replica.next_start for replica in self._replicas.values() if replica.state is RunState.RESTARTING]
        return min(times, default=None)

    # --- the passing of time -----------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Start, give up or forget the replicas whose time has come."""
        self._take_arrivals()
        self._start_due(now)
        self._lose_silent(now)
        self._end_leavers(now)

    def _take_arrivals(self) -> None:
        with self._arrivals_lock:
            arrivals, self._arrivals = list(self._arrivals), deque()
        for number, member in arrivals:
            replica = self._replicas.get(number)
            if replica is None or replica.state is not RunState.AWAITED:
                log.warning("replica %d of %s is not awaited and is sent away", number, member.host)
                self._dismiss(member)
                continue
            self._set.expect(number)
            replica.take_over(member, member.host, member.pid)
            replica.started(self._clock())

    def _start_due(self, now: float) -> None:
        for replica in list(self._replicas.values()):
            late = now - replica.since > self._limits.start_timeout
            if replica.state is RunState.STARTING and replica.first is None and late:
                self._kill(
                    replica,
                    EngineError(f"replica {replica.number} was not ready within {self._limits.start_timeout:g} s"),
                )
        if self._together:
            self._start_together(now)
            return
        for replica in list(self._replicas.values()):
            if replica.is_due(now):
                self._start(replica)

    def _start_together(self, now: float) -> None:
        """Restart replicas that compute together: the end of one ends the others, and they start when each is due."""
        local = [replica for replica in self._replicas.values() if replica.local]
        down = [replica for replica in local if replica.state is RunState.RESTARTING]
        if not down:
            return
        for replica in local:
            if replica.state is RunState.STARTING:
                self._kill(replica, EngineError(f"replica {down[0].number}, which it needs, has ended"))
        if all(replica.is_due(now) for replica in local):
            self._generation += 1
            for replica in local:
                self._start(replica)

    def _lose_silent(self, now: float) -> None:
        """Give up replicas that have requests and say nothing: a busy engine reports its stats every now and then. Time
        in which this process itself was stopped does not count."""
        if now - self._listened < _LISTEN_S:
            return
        passed, self._listened = min(now - self._listened, _MOST_PASSED_S), now
        for replica in list(self._replicas.values()):
            if replica.state is not RunState.READY or replica.member is None:
                continue
            held = (
                self._set.held(replica.number) if self._set.activity.runs else 0
            )  # while paused it has nothing to say
            quiet = replica.listen(replica.member, held=held, passed=passed)
            if quiet > self._limits.answer_timeout:
                silent = f"{replica.member.name} has {held} requests and has said nothing for {quiet:.0f} s"
                self._set.lose(replica.number, EngineError(f"{silent} (--step-timeout): it hangs"))

    def _end_leavers(self, now: float) -> None:
        for entry in [entry for entry in self._ending if entry[0] <= now or entry[1].has_ended]:
            self._ending.remove(entry)
            entry[1].abandon()
            for replica in [replica for replica in self._replicas.values() if replica.member is entry[1]]:
                self._forget(replica)

    def welcome(self) -> None:
        """Admit replicas that have become ready."""
        for replica in list(self._replicas.values()):
            if replica.state is not RunState.STARTING or replica.member is None:
                continue
            try:
                stats = replica.member.ready(0)
            except ShoalError as error:
                replica.member.abandon()
                self._end(replica, error)
                continue
            if stats is not None:
                replica.note_first(stats)
        if self._length is None:
            self._decide_length()
        if self._length is not None:
            for replica in list(self._replicas.values()):
                if replica.state is RunState.STARTING and replica.member is not None and replica.first is not None:
                    self._admit(replica, replica.member, replica.first, self._length)
        if not self._has_started:
            self._has_started = self.any_ready and all(replica.was_ready for replica in self._staying_here())

    def _decide_length(self) -> None:
        """Decide how many tokens a request may have, once enough replicas are ready. If the KV cache of one holds less
        than was planned, those of others may hold still less: they are waited for."""
        starting = [
            replica for replica in self._replicas.values() if replica.state in (RunState.STARTING, RunState.AWAITED)
        ]
        lengths = [replica.first.max_model_len for replica in starting if replica.first is not None]
        awaited = [replica for replica in starting if replica.first is None and (replica.local or self._together)]
        if not lengths or (awaited and min(lengths) < self._limits.max_model_len):
            return
        self._length = min(lengths)
        if self._length < self._limits.max_model_len:
            log.warning(
                "a request may have %d tokens, not %d: the KV cache holds no more",
                *(self._length, self._limits.max_model_len),
            )
        self._on_length(self._length)

    def _admit(self, replica: SupervisedReplica, member: ReplicaClient, stats: EngineStats, length: int) -> None:
        if stats.max_model_len < length:
            if replica.local:
                member.abandon()
            else:
                self._dismiss(member)
            shorter = f"{member.name} holds requests of {stats.max_model_len} tokens, but {length} are served"
            error = EngineError(f"{shorter}: start the server with --max-model-len {stats.max_model_len}")
            log.error("%s", error)
            self._end(replica, error)
            return
        now = self._clock()
        log.info(
            "replica %d is ready after %.2f s: %d KV blocks", replica.number, now - replica.since, stats.num_blocks
        )
        replica.admit(member, now)
        self._set.admit(replica.number, member, self._room(stats), stats.activity)

    # --- starts and ends ---------------------------------------------------------------------------------------------

    def _add_replica(self, number: int, *, local: bool) -> SupervisedReplica:
        replica = self._replicas[number] = SupervisedReplica(
            number=number,
            restarts=Restarts(self._limits.max_restarts, "--max-restarts"),
            elsewhere=not local,
            useful_s=_USEFUL_S,
            state=RunState.NEW if local else RunState.AWAITED,
            since=self._clock(),
            past=self._pasts.pop(number, None),
        )
        return replica

    def _forget(self, replica: SupervisedReplica) -> None:
        """Forget a replica but for its counters, which go on if its number is added again."""
        stats = replica.stats
        if stats is not None:
            self._pasts[replica.number] = emptied(stats)
        del self._replicas[replica.number]

    def _start(self, replica: SupervisedReplica) -> None:
        self._set.expect(replica.number)
        replica.started(self._clock())
        replica.host = socket.gethostname()
        try:
            replica.member = self._launch(replica.number, self._generation)
            replica.pid = getattr(replica.member, "pid", os.getpid())
        except ShoalError as error:
            self._end(replica, error)
        except OSError as error:  # no memory for a process, no descriptors
            self._end(replica, EngineError(f"replica {replica.number} can't be started: {error}"))

    def _kill(self, replica: SupervisedReplica, error: EngineError) -> None:
        if replica.member is not None:
            replica.member.abandon()
        self._end(replica, error)

    def lost(self, number: int, error: EngineError) -> None:
        """Note that a replica of the set has ended."""
        self._end(self._replicas[number], error)

    def _end(self, replica: SupervisedReplica, error: ShoalError) -> None:
        """Note that a replica has ended, or could not be started."""
        replica.close_run(error)
        if self._closed:
            return
        now = self._clock()
        companions = list(self._replicas.values()) if self._together else [replica]
        replica.ended(
            error,
            now,
            useful=any(each.was_useful(now, worked=self._set.drew(each.number)) for each in companions),
            ever_ready=any(each.was_ready for each in companions),
        )
        if replica.state is RunState.FAILED:
            self._fail(replica, error)
        elif replica.state is RunState.RESTARTING:
            log.warning("replica %d %s", replica.number, replica.outlook)

    def _fail(self, replica: SupervisedReplica, error: ShoalError) -> None:
        """Give up a replica. With none left that can come back, nothing can be served any more."""
        log.error("%s; replica %d %s", error, replica.number, replica.outlook)
        self._refuse_pinned(replica, f"replica {replica.number}, which it names, is not started again: {error}")
        replicas = [each for each in self._replicas.values() if each.state is not RunState.LEAVING]
        failed = [each for each in replicas if each.state is RunState.FAILED]
        if self._fatal is not None or (len(failed) < len(replicas) and not self._together):
            return
        causes = "; ".join(f"replica {each.number}: {each.error}" for each in failed)
        self._failure = f"no replica is left: {causes}" if len(replicas) > 1 else str(error)
        mistakes = [each.error for each in failed if isinstance(each.error, UserError)]
        self._fatal = type(mistakes[0])(self._failure) if mistakes else EngineError(self._failure)
        self._set.give_up(self._failure)

    def _refuse_pinned(self, replica: SupervisedReplica, why: str) -> None:
        """End the requests that wait for this replica and no other."""
        for seq in self._set.waiting_for(replica.number):
            self._set.refuse(seq, why, RefusalKind.LOST)

    # --- more and fewer --------------------------------------------------------------------------------------------

    def arrive(self, number: int, member: RemoteReplica) -> None:
        """Hand over a replica that has arrived from another host; the next `tick` takes it. From any thread."""
        with self._arrivals_lock:
            self._arrivals.append((number, member))

    def scale(self, count: int) -> None:
        """Have `count` replicas from now on, as `Fleet.scale` says."""
        if self._fatal is not None:
            raise self._fatal
        if count < 1:
            raise ConfigError(f"there must be at least one replica, got {count}")
        replicas = [self._replicas[number] for number in sorted(self._replicas)]
        staying = [replica for replica in replicas if replica.state not in (RunState.LEAVING, RunState.FAILED)]
        if self._together and count != len(staying):
            raise ConfigError("replicas that share experts start and end together: their number stays as it is")
        for replica in staying[count:]:
            self._take_out(replica)
        for replica in replicas:
            if replica.state is RunState.FAILED:
                self._forget(replica)
        unused = (each for each in itertools.count() if each not in self._replicas and each not in self._elsewhere)
        for number in itertools.islice(unused, max(0, count - len(staying))):
            log.info("replica %d is added", number)
            self._start(self._add_replica(number, local=True))

    def _take_out(self, replica: SupervisedReplica) -> None:
        log.info(
            "replica %d is taken out; its %d requests go on at others", replica.number, self._set.held(replica.number)
        )
        if replica.state is RunState.READY:
            self._set.retire(replica.number)
        self._refuse_pinned(replica, f"replica {replica.number}, which it names, was taken out")
        if replica.member is None:
            self._forget(replica)
            return
        replica.taken_out(self._clock())
        self._dismiss(replica.member)

    def _dismiss(self, member: ReplicaClient) -> None:
        member.dismiss()
        self._ending.append((self._clock() + _LEAVE_S, member))
