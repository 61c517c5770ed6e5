"""The supervisor of a fleet's replicas, which starts, admits, restarts, adds and removes them."""

import itertools
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Protocol

from shoal.cluster.limits import FleetLimits
from shoal.cluster.replica_set import ReplicaSet
from shoal.cluster.replicas.replica import close_all
from shoal.cluster.replicas.replica_client import ReplicaClient
from shoal.cluster.replicas.restart_budget import RestartBudget
from shoal.cluster.replicas.supervised import RunState
from shoal.cluster.replicas.supervised_replica import SupervisedReplica
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.stats import keep_counters
from shoal.errors import ConfigError, EngineError, RequestError, ShoalError, UserError
from shoal.log import get_logger
from shoal.wire.engine import EngineStats, RefusalKind
from shoal.wire.fleet import ReplicaStatus

log = get_logger("fleet")

_LEAVE_S = 5.0  # how long a replica that was taken out may take to end by itself
_LEAVERS_EVERY_S = 0.1  # how often such replicas are checked
_SILENCE_EVERY_S = 0.5  # how often replicas are checked for silence
_MAX_PASSED_S = 2.0  # the longest time between two such checks that counts; in a longer one this process was stopped
_USEFUL_S = 60.0  # a run in which a replica was ready for so long was useful
_MAX_NAMED = 8  # replicas that an error names


class RemoteReplica(ReplicaClient, Protocol):
    """A replica that another host has started. `host` and `pid` say where it runs."""

    host: str
    pid: int


class ReplicaSupervisor:
    """The supervisor of a fleet's replicas. It is a part of `Fleet`, and runs on its thread.

    A replica that ends is started again by the rule of `Supervised`; a replica of another host is awaited. When no
    replica can serve or come back, all requests of the set end. The first ready replicas decide the context length:
    what their KV caches hold. From then on, ready replicas are admitted to the set if they hold as much.
    """

    def __init__(
        self,
        launch: Callable[[int, int], ReplicaClient],
        capacity_of: Callable[[EngineStats], ReplicaCapacity],
        members: ReplicaSet,
        *,
        limits: FleetLimits,
        local: Sequence[int],
        awaited: Sequence[int],
        served_elsewhere: Container[int],
        in_lockstep: bool,
        on_context_length: Callable[[int], object],
        clock: Callable[[], float],
    ) -> None:
        """Start nothing yet. Further arguments are those of `Fleet`.

        Args:
            members: the set to which ready replicas are admitted.
            on_context_length: is called once, with the context length.
        """
        self._launch = launch
        self._capacity_of = capacity_of
        self._set = members
        self._limits = limits
        self._served_elsewhere = served_elsewhere
        self._in_lockstep = in_lockstep
        self._on_context_length = on_context_length
        self._clock = clock
        self._generation = 0
        self._replicas: dict[int, SupervisedReplica] = {}
        self._past_counters: dict[int, EngineStats] = {}  # of replicas that were taken out
        self._context_length: int | None = None
        self._has_started = False
        self._silence_checked = clock()
        self._leavers: list[tuple[float, ReplicaClient]] = []  # (when to kill it, taken out)
        self._arrivals: deque[tuple[int, RemoteReplica]] = deque()
        self._arrivals_lock = threading.Lock()
        self._failure = ""
        self._fatal: ShoalError | None = None
        self._closed = False
        for number in awaited:
            self._add_replica(number, local=False)
        for number in local:
            self._add_replica(number, local=True)

    def start(self) -> None:
        """Start the replicas of this host."""
        for replica in [replica for replica in self._replicas.values() if replica.local]:
            self._start(replica)

    def stop_restarts(self) -> None:
        """Start no replica any more."""
        self._closed = True

    def close(self) -> None:
        """End all replicas. Idempotent, never raises."""
        self._closed = True
        members = [replica.member for replica in self._replicas.values() if replica.member is not None]
        with self._arrivals_lock:
            members += [member for _, member in self._arrivals]
            self._arrivals.clear()
        close_all([*members, *(member for _, member in self._leavers)])

    # --- the state of replicas -------------------------------------------------------------------------------------

    @property
    def fatal(self) -> ShoalError | None:
        """The reason why no replica can serve or come back; None while one can."""
        return self._fatal

    @property
    def failure(self) -> str:
        """The same reason in words; "" while a replica can serve or come back."""
        return self._failure

    @property
    def any_ready(self) -> bool:
        return any(replica.state is RunState.READY for replica in self._replicas.values())

    @property
    def started(self) -> bool:
        """True if every replica of this host can serve requests, as `Fleet.started` says.

        Raises:
            UserError, EngineError: a replica of this host cannot become ready, and not all have been ready once; or no
                replica is left.
        """
        if self._fatal is not None:
            raise self._fatal
        local = self._staying_local()
        for replica in [] if self._has_started else local:
            if replica.state is RunState.FAILED and not replica.was_ready and replica.error is not None:
                raise replica.error
        return self.any_ready and all(
            replica.state in (RunState.READY, RunState.FAILED)
            or (self._has_started and replica.state is RunState.STARTING and not replica.was_ready)
            for replica in local
        )

    def _staying_local(self) -> list[SupervisedReplica]:
        return [
            replica for replica in self._replicas.values() if replica.local and replica.state is not RunState.LEAVING
        ]

    def statuses(self) -> tuple[ReplicaStatus, ...]:
        now = self._clock()
        return tuple(
            self._replicas[number].status(now, self._set.num_held_by(number)) for number in sorted(self._replicas)
        )

    def objection(self, number: int) -> tuple[RequestError | str, RefusalKind] | None:
        """Return why a request that names this replica cannot be served; None if it can."""
        replica = self._replicas.get(number)
        if replica is None or replica.state is RunState.LEAVING:
            why = f"there is no replica {number}, only {self._known()}"
            return RequestError(why, "data_parallel_rank"), RefusalKind.INVALID
        if replica.state is RunState.FAILED:
            return f"replica {number} is not started again: {replica.error}", RefusalKind.LOST
        return None

    def max_held(self, number: int) -> int | None:
        """Return how many requests a replica can have at a time, or all together if the number is -1.

        None: that is not known before a replica has been ready.
        """
        replicas = [self._replicas[number]] if number >= 0 else list(self._replicas.values())
        known = [
            self._capacity_of(each.first_stats).requests
            for each in self._replicas.values()
            if each.first_stats is not None
        ]
        gone = (RunState.FAILED, RunState.LEAVING)
        return max(known) * sum(each.state not in gone for each in replicas) if known else None

    def _known(self) -> str:
        numbers = sorted(replica.number for replica in self._replicas.values() if replica.state is not RunState.LEAVING)
        return ", ".join([*map(str, numbers[:_MAX_NAMED]), *(["..."] if len(numbers) > _MAX_NAMED else [])])

    def starting(self) -> list[ReplicaClient]:
        """Return the replicas that are starting, and will send a message when they are ready."""
        found = [replica.member for replica in self._replicas.values() if replica.state is RunState.STARTING]
        return [member for member in found if member is not None]

    @property
    def next_due(self) -> float | None:
        """The time at which `tick` has something to do; None: not before a replica sends a message."""
        times = [self._clock() + _LEAVERS_EVERY_S] if self._leavers else []
        if self._fatal is None:
            times += [replica.next_start for replica in self._replicas.values() if replica.state is RunState.RESTARTING]
        return min(times, default=None)

    # --- the passing of time -----------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Start the replicas that are due, and kill those that are too late, silent, or still leaving."""
        self._take_arrivals()
        self._start_due(now)
        self._kill_silent(now)
        self._kill_leavers(now)

    def _take_arrivals(self) -> None:
        with self._arrivals_lock:
            arrivals, self._arrivals = list(self._arrivals), deque()
        for number, member in arrivals:
            replica = self._replicas.get(number)
            if replica is None or replica.state is not RunState.AWAITED:
                log.warning("replica %d of %s is not awaited and is dismissed", number, member.host)
                self._dismiss(member)
                continue
            self._set.note_start(number)
            replica.take_over(member, member.host, member.pid)
            replica.started(self._clock())

    def _start_due(self, now: float) -> None:
        for replica in list(self._replicas.values()):
            late = now - replica.since > self._limits.start_timeout
            if replica.state is RunState.STARTING and replica.first_stats is None and late:
                self._kill(
                    replica,
                    EngineError(f"replica {replica.number} was not ready within {self._limits.start_timeout:g} s"),
                )
        if self._in_lockstep:
            self._restart_lockstep(now)
            return
        for replica in list(self._replicas.values()):
            if replica.is_due(now):
                self._start(replica)

    def _restart_lockstep(self, now: float) -> None:
        """Restart replicas in lockstep. The end of one ends the others; all start again when each of them is due."""
        local = [replica for replica in self._replicas.values() if replica.local]
        down = [replica for replica in local if replica.state is RunState.RESTARTING]
        if not down:
            return
        for replica in local:
            if replica.state is RunState.STARTING:
                self._kill(replica, EngineError(f"replica {down[0].number}, without which it cannot go on, has ended"))
        if all(replica.is_due(now) for replica in local):
            self._generation += 1
            for replica in local:
                self._start(replica)

    def _kill_silent(self, now: float) -> None:
        """Kill replicas that have requests but send nothing: a busy engine sends its stats from time to time.

        Time in which this process itself was stopped does not count.
        """
        if now - self._silence_checked < _SILENCE_EVERY_S:
            return
        passed, self._silence_checked = min(now - self._silence_checked, _MAX_PASSED_S), now
        for replica in list(self._replicas.values()):
            if replica.state is not RunState.READY or replica.member is None:
                continue
            # A paused replica has no reason to send anything, even if it has requests.
            held = self._set.num_held_by(replica.number) if self._set.activity.runs else 0
            silent_s = replica.silent_for(replica.member, held=held, passed=passed)
            if silent_s > self._limits.answer_timeout:
                silent = f"{replica.member.name} has {held} requests and has sent nothing for {silent_s:.0f} s"
                self._set.lose(replica.number, EngineError(f"{silent} (--step-timeout): it hangs"))

    def _kill_leavers(self, now: float) -> None:
        for entry in [entry for entry in self._leavers if entry[0] <= now or entry[1].has_ended]:
            self._leavers.remove(entry)
            entry[1].abandon()
            for replica in [replica for replica in self._replicas.values() if replica.member is entry[1]]:
                self._forget(replica)

    def admit_ready(self) -> None:
        """Admit replicas that have become ready, once the context length is known."""
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
        if self._context_length is None:
            self._decide_context_length()
        if self._context_length is not None:
            for replica in list(self._replicas.values()):
                if (
                    replica.state is RunState.STARTING
                    and replica.member is not None
                    and replica.first_stats is not None
                ):
                    self._admit(replica, replica.member, replica.first_stats, self._context_length)
        if not self._has_started:
            self._has_started = self.any_ready and all(replica.was_ready for replica in self._staying_local())

    def _decide_context_length(self) -> None:
        """Decide the context length, once enough replicas are ready.

        If the KV cache of a ready replica holds less than was planned, other caches may hold still less, so all
        replicas that are starting are waited for.
        """
        starting = [
            replica for replica in self._replicas.values() if replica.state in (RunState.STARTING, RunState.AWAITED)
        ]
        lengths = [replica.first_stats.max_model_len for replica in starting if replica.first_stats is not None]
        awaited = [
            replica for replica in starting if replica.first_stats is None and (replica.local or self._in_lockstep)
        ]
        if not lengths or (awaited and min(lengths) < self._limits.max_model_len):
            return
        self._context_length = min(lengths)
        if self._context_length < self._limits.max_model_len:
            log.warning(
                "the context length is %d tokens, not %d, because the KV cache holds no more",
                *(self._context_length, self._limits.max_model_len),
            )
        self._on_context_length(self._context_length)

    def _admit(self, replica: SupervisedReplica, member: ReplicaClient, stats: EngineStats, length: int) -> None:
        if stats.max_model_len < length:
            if replica.local:
                member.abandon()
            else:
                self._dismiss(member)
            less = f"{member.name} holds requests of {stats.max_model_len} tokens, but the context length is {length}"
            error = EngineError(f"{less}: start the server with --max-model-len {stats.max_model_len}")
            log.error("%s", error)
            self._end(replica, error)
            return
        now = self._clock()
        log.info(
            "replica %d is ready after %.2f s: %d KV blocks", replica.number, now - replica.since, stats.num_blocks
        )
        replica.admit(member, now)
        self._set.admit(replica.number, member, self._capacity_of(stats), stats.activity)

    # --- starts and ends ---------------------------------------------------------------------------------------------

    def _add_replica(self, number: int, *, local: bool) -> SupervisedReplica:
        replica = self._replicas[number] = SupervisedReplica(
            number=number,
            restarts=RestartBudget(self._limits.max_restarts, "--max-restarts"),
            started_elsewhere=not local,
            useful_s=_USEFUL_S,
            state=RunState.NEW if local else RunState.AWAITED,
            since=self._clock(),
            past=self._past_counters.pop(number, None),
        )
        return replica

    def _forget(self, replica: SupervisedReplica) -> None:
        """Forget a replica, but keep its counters for a replica that is added with the same number."""
        stats = replica.stats
        if stats is not None:
            self._past_counters[replica.number] = keep_counters(stats)
        del self._replicas[replica.number]

    def _start(self, replica: SupervisedReplica) -> None:
        self._set.note_start(replica.number)
        replica.started(self._clock())
        replica.host = socket.gethostname()
        try:
            replica.member = self._launch(replica.number, self._generation)
            replica.pid = getattr(replica.member, "pid", os.getpid())
        except ShoalError as error:
            self._end(replica, error)
        except OSError as error:  # no memory for a process, or no file descriptor left
            self._end(replica, EngineError(f"replica {replica.number} cannot be started: {error}"))

    def _kill(self, replica: SupervisedReplica, error: EngineError) -> None:
        if replica.member is not None:
            replica.member.abandon()
        self._end(replica, error)

    def lost(self, number: int, error: EngineError) -> None:
        """Note that a replica of the set has ended."""
        self._end(self._replicas[number], error)

    def _end(self, replica: SupervisedReplica, error: ShoalError) -> None:
        """Note that a replica has ended, or could not be started, and decide what follows."""
        replica.close_run(error)
        if self._closed:
            return
        now = self._clock()
        connected = list(self._replicas.values()) if self._in_lockstep else [replica]
        replica.ended(
            error,
            now,
            useful=any(each.was_useful(now, worked=self._set.has_drawn(each.number)) for each in connected),
            ever_ready=any(each.was_ready for each in connected),
        )
        if replica.state is RunState.FAILED:
            self._fail(replica, error)
        elif replica.state is RunState.RESTARTING:
            log.warning("replica %d %s", replica.number, replica.outlook)

    def _fail(self, replica: SupervisedReplica, error: ShoalError) -> None:
        """Give up a replica. If no other can serve or come back, end all requests."""
        log.error("%s; replica %d %s", error, replica.number, replica.outlook)
        why = f"replica {replica.number}, which the request names, is not started again: {error}"
        self._refuse_pinned(replica, why)
        replicas = [each for each in self._replicas.values() if each.state is not RunState.LEAVING]
        failed = [each for each in replicas if each.state is RunState.FAILED]
        if self._fatal is not None or (len(failed) < len(replicas) and not self._in_lockstep):
            return
        causes = "; ".join(f"replica {each.number}: {each.error}" for each in failed)
        self._failure = f"no replica is left: {causes}" if len(replicas) > 1 else str(error)
        mistakes = [each.error for each in failed if isinstance(each.error, UserError)]
        self._fatal = type(mistakes[0])(self._failure) if mistakes else EngineError(self._failure)
        self._set.end_all(self._failure)

    def _refuse_pinned(self, replica: SupervisedReplica, why: str) -> None:
        """End the requests that only this replica may run."""
        for seq in self._set.waiting_for(replica.number):
            self._set.refuse(seq, why, RefusalKind.LOST)

    # --- changes of the number of replicas -------------------------------------------------------------------------

    def arrive(self, number: int, member: RemoteReplica) -> None:
        """Add a replica that another host has started, with the next `tick`. May be called from any thread."""
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
        if self._in_lockstep and count != len(staying):
            raise ConfigError("replicas that share experts start and end together, so their number cannot be changed")
        for replica in staying[count:]:
            self._take_out(replica)
        for replica in replicas:
            if replica.state is RunState.FAILED:
                self._forget(replica)
        used = (self._replicas, self._served_elsewhere)
        unused = (number for number in itertools.count() if not any(number in each for each in used))
        for number in itertools.islice(unused, max(0, count - len(staying))):
            log.info("replica %d is added", number)
            self._start(self._add_replica(number, local=True))

    def _take_out(self, replica: SupervisedReplica) -> None:
        num_held = self._set.num_held_by(replica.number)
        log.info("replica %d is taken out; its %d requests go on at the others", replica.number, num_held)
        if replica.state is RunState.READY:
            self._set.retire(replica.number)
        self._refuse_pinned(replica, f"replica {replica.number}, which the request names, was taken out")
        if replica.member is None:
            self._forget(replica)
            return
        replica.taken_out(self._clock())
        self._dismiss(replica.member)

    def _dismiss(self, member: ReplicaClient) -> None:
        member.dismiss()
        self._leavers.append((self._clock() + _LEAVE_S, member))
