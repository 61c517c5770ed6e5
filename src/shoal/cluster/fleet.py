"""All replicas behind one address: requests wait for them, go to them, and survive them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.activity import ActivityState
from shoal.cluster.limits import FleetLimits
from shoal.cluster.members.replica_supervisor import RemoteReplica, ReplicaSupervisor
from shoal.cluster.operations import Done
from shoal.cluster.replica_set import ReplicaClient, ReplicaSet
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.timers import Timers
from shoal.errors import ConfigError, EngineError, RequestError, ShoalError, context_length_exceeded
from shoal.protocols import Recorder
from shoal.transport.channel import wait
from shoal.transport.waker import Waker
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest, EngineStats, RefusalKind, SeqUpdate
from shoal.wire.fleet import FleetStatus, Operation

_FOREVER_S = 3600.0


@dataclass(frozen=True, slots=True)
class About:
    model: str
    tp: int
    pp: int


class Fleet:
    """Several replicas as one engine, which come back when they end. Not thread-safe, but for `wake` and `arrive`.

    Requests wait while no replica is there; `ReplicaSupervisor` decides what becomes of replicas. All requests are cut
    to one length, which all replicas hold, so that each ends at the same token wherever it runs and goes on.
    """

    def __init__(
        self,
        launch: Callable[[int, int], ReplicaClient],
        room: Callable[[EngineStats], ReplicaCapacity],
        *,
        about: About,
        limits: FleetLimits,
        local: Sequence[int],
        awaited: Sequence[int] = (),
        elsewhere: Sequence[int] = (),
        together: bool = False,
        recorder: Recorder | None = None,
        on_close: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`launch(number, generation)` starts a replica of this host; replicas that compute `together` have the same
        generation, a new one whenever they are started anew. `room` says how much one can use. The numbers `elsewhere`
        are taken by replicas that are no part of this fleet."""
        self._about = about
        self._needed_elsewhere = together and len(elsewhere) > 0
        self._limits = limits
        self._clock = clock
        self._began = clock()
        self._length: int | None = None  # tokens of a prompt and its output
        self._sources: list[Any] = []  # what else is waited for
        self._waker = Waker()
        self._accepting = True
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
        self._supervisor = ReplicaSupervisor(
            launch,
            room,
            self._set,
            limits=limits,
            local=local,
            awaited=awaited,
            elsewhere=elsewhere,
            together=together,
            on_length=self._bound,
            clock=clock,
        )
        self._supervisor.begin()

    def _lost(self, number: int, error: EngineError) -> None:
        self._supervisor.lost(number, error)

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Takes a request over. One that can't be taken ends at once, with the reason in its update.

        Raises:
            RequestError: its number is in use.
        """
        now = self._clock()
        request = replace_fields(request, arrival=request.arrival or now)
        objection = self._objection(request)
        if objection is not None:
            self._set.reject(request, *objection)
            return
        try:
            request = self._cut(request)
        except RequestError as error:
            self._set.reject(request, error, RefusalKind.INVALID)
            return
        deadline = float("inf") if request.deadline is None else request.deadline
        if self._limits.timeout is not None:
            deadline = min(deadline, request.arrival + self._limits.timeout)
        self._set.add(
            replace_fields(request, deadline=None)
        )  # it is kept here: another host's clock shows another time
        if self._set.is_new(request.seq) and self._set.num_waiting > self._limits.max_queued:
            most = f"{self._limits.max_queued} requests wait already (--max-queued-requests): come again later"
            self._set.refuse(request.seq, most, RefusalKind.FULL)
            return
        if deadline < float("inf"):
            self._deadlines.add(deadline, request.seq)
        if self._limits.max_wait is not None:
            self._patience.add(now + self._limits.max_wait, request.seq)

    def _objection(self, request: EngineRequest) -> tuple[RequestError | str, RefusalKind] | None:
        """Why a request is not taken, whatever else waits."""
        if self._supervisor.failure:
            return self._supervisor.failure, RefusalKind.LOST
        if not self._accepting:
            return "the server is about to end and takes no new requests", RefusalKind.CLOSING
        if self._set.activity.state is ActivityState.ASLEEP:
            return "the model is asleep, and takes requests when it was woken up (POST /wake_up)", RefusalKind.ASLEEP
        objection = self._supervisor.objection(request.replica) if request.replica >= 0 else None
        return objection or self._too_many(request)

    def _too_many(self, request: EngineRequest) -> tuple[RequestError | str, RefusalKind] | None:
        """Why a request can't be taken even if there is no other: one whose outputs don't fit in all."""
        held, queued = self._supervisor.most_held(request.replica), self._limits.max_queued
        if held is None or request.outputs <= held + queued:
            return None
        why = (
            f"n times prompts makes {request.outputs} outputs, and {held + queued} can be taken at a time: {held} that "
            f"replicas hold (--max-num-seqs) and {queued} that wait (--max-queued-requests); ask for fewer, or raise "
            "one of the two"
        )
        return RequestError(why, "n"), RefusalKind.INVALID

    @property
    def max_model_len(self) -> int | None:
        """Tokens that a prompt and its output may have together; None before the first replicas are ready."""
        return self._length

    def _bound(self, length: int) -> None:
        self._length = length
        self._set.bound(self._cut)

    def _cut(self, request: EngineRequest) -> EngineRequest:
        """
        Raises:
            RequestError: no replica holds its prompt and a token.
        """
        if self._length is None:
            return request
        prompt_len = request.num_prompt_tokens
        if prompt_len >= self._length:
            raise context_length_exceeded(
                self._length,
                f"the prompt has {prompt_len}, and an output needs one: shorten it, or give the replicas more memory "
                "for their KV caches",
            )
        return replace_fields(request, max_tokens=min(request.max_tokens, self._length - prompt_len))

    def refuse(self, seq: int, why: str) -> bool:
        """Ends a request that can't be served; False if there is none of that number."""
        found = self._set.is_open(seq)
        self._set.refuse(seq, why, RefusalKind.FAILED)
        return found

    def abort(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        self._set.abort(seqs, stopped=stopped)

    def updates(self, timeout: float) -> list[SeqUpdate]:
        """Drives everything: waits for replicas, starts those that are due, ends requests whose time is up."""
        self._tick()
        updates = self._set.updates(min(timeout, self.pause()))
        self._supervisor.welcome()
        return updates

    def _tick(self) -> None:
        now = self._clock()
        self._supervisor.tick(now)
        for seq in self._deadlines.due(now):
            self._set.refuse(seq, "the request was not finished by its deadline", RefusalKind.LATE)
        for seq in self._patience.due(now):
            waited = f"the request waited {self._limits.max_wait:g} s for a replica (--max-queue-wait)"
            self._set.refuse(seq, waited, RefusalKind.LATE)

    def close(self) -> None:
        """Ends all replicas. Idempotent, never raises."""
        self._supervisor.closing()
        self._set.close()
        self._supervisor.close()
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
        return self._supervisor.fatal

    @property
    def any_ready(self) -> bool:
        return self._supervisor.any_ready

    @property
    def started(self) -> bool:
        """Can requests be served, by every replica of this host?

        Raises:
            UserError, EngineError: one of them has never been ready, and will not be, before all were up for the
                first time; or none is left at all.
        """
        return self._supervisor.started

    def status(self) -> FleetStatus:
        return FleetStatus(
            model=self._about.model,
            tp=self._about.tp,
            pp=self._about.pp,
            replicas=self._supervisor.states(),
            queued=self._set.num_waiting,
            replays=self._set.replays,
            accepting=self._accepting and not self._supervisor.failure,
            uptime_s=self._clock() - self._began,
            failure=self._supervisor.failure,
            max_model_len=self._length or 0,
            activity=self._set.activity.state.value,
            sleep_level=self._set.activity.level,
            missing=self._set.activity.missing,
        )

    def operate(self, wanted: Operation, done: Done) -> None:
        """Pauses all replicas, lets them go on, sends them to sleep, wakes them up, or empties their prefix caches.
        `done` is told how it ended, from `updates`; replicas that come up meanwhile do the same.

        Raises:
            ConfigError: ranks of replicas that this fleet does not have compute with these.
        """
        if wanted.verb == "sleep" and wanted.level and self._needed_elsewhere:
            raise ConfigError(
                "replicas at other addresses compute together with these (--enable-expert-parallel), and can't while "
                "they are asleep: pause them, or serve all behind one address"
            )
        self._set.operate(wanted, done)

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
        self._supervisor.scale(count)

    def arrive(self, number: int, member: RemoteReplica) -> None:
        """A replica that another host has started, and that says by itself when it is ready. From any thread."""
        self._supervisor.arrive(number, member)
        self.wake()

    # --- waiting ---------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Ends the wait of `updates`. From any thread."""
        self._waker.wake()

    def watch(self, source: Any) -> None:
        """`updates` returns when this has something to read, too."""
        self._sources.append(source)

    def unwatch(self, source: Any) -> None:
        if source in self._sources:
            self._sources.remove(source)

    @property
    def num_timers(self) -> int:
        """The number of deadlines and waiting limits that are kept, those of ended requests included."""
        return len(self._deadlines) + len(self._patience)

    def pause(self) -> float:
        """Return the seconds until something is due, if nothing happens before."""
        now = self._clock()
        times = (self._deadlines.next, self._patience.next, self._supervisor.next_due)
        return max(0.0, min((time for time in times if time is not None), default=now + _FOREVER_S) - now)

    def _wait_for_any(self, replicas: Sequence[ReplicaClient], timeout: float) -> None:
        channels: list[Any] = [member.channel for member in (*replicas, *self._supervisor.starting())]
        channels += [self._waker, *(source for source in self._sources if source.fileno() >= 0)]
        wait(channels, timeout)
        self._waker.clear()
