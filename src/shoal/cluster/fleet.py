"""A fleet: all replicas behind one address. Requests outlive the replicas that have them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.activity import ActivityState
from shoal.cluster.expiry_queue import ExpiryQueue
from shoal.cluster.limits import FleetLimits
from shoal.cluster.operations import Done
from shoal.cluster.replica_set import ReplicaSet
from shoal.cluster.replica_traces import ReplicaTraces
from shoal.cluster.replicas.replica_client import ReplicaClient
from shoal.cluster.replicas.replica_supervisor import RemoteReplica, ReplicaSupervisor
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.errors import ConfigError, EngineError, RequestError, ShoalError, context_length_exceeded
from shoal.protocols import Recorder
from shoal.transport.channel import wait
from shoal.transport.waker import Waker
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest, EngineStats, RefusalKind, SeqUpdate
from shoal.wire.fleet import FleetStatus, Operation

_IDLE_S = 3600.0  # the longest wait if no timer is set


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The facts about the model in the status of a fleet."""

    name: str
    tp: int  # tensor-parallel size of each replica
    pp: int  # pipeline-parallel size of each replica


class Fleet:
    """Several replicas as one engine. A replica that ends is started again. Only `wake` and `arrive` are thread-safe.

    Requests wait while no replica is ready. A `ReplicaSupervisor` starts replicas and decides which of them may come
    back. Requests are limited to one context length that all replicas hold, so that a request ends at the same token
    whichever replicas run it.
    """

    def __init__(
        self,
        launch: Callable[[int, int], ReplicaClient],
        capacity_of: Callable[[EngineStats], ReplicaCapacity],
        *,
        model: ModelSummary,
        limits: FleetLimits,
        local: Sequence[int],
        awaited: Sequence[int] = (),
        served_elsewhere: Sequence[int] = (),
        in_lockstep: bool = False,
        recorder: Recorder | None = None,
        on_close: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the replicas of this host.

        Args:
            launch: starts a replica of this host, from its number and the generation. The generation is how many times
                replicas in lockstep were started again together.
            capacity_of: returns how much a replica can have at a time, from its first stats.
            local: the numbers of the replicas of this host.
            awaited: the numbers of the replicas that other hosts start for this fleet.
            served_elsewhere: the numbers of replicas that are no part of this fleet.
            in_lockstep: True if all replicas compute in lockstep, those that are served elsewhere too.
            on_close: ends what the replicas needed. It may be called more than once.
        """
        self._model = model
        self._needed_elsewhere = in_lockstep and len(served_elsewhere) > 0
        self._limits = limits
        self._clock = clock
        self._began = clock()
        self._context_length: int | None = None
        self._sources: list[Any] = []  # what `updates` waits for besides replicas
        self._waker = Waker()
        self._accepting = True
        self._set = ReplicaSet(
            {},
            {},
            in_lockstep=in_lockstep,
            on_close=on_close,
            wait_for=self._wait_for_any,
            on_loss=self._lost,
            recorder=recorder,
        )
        self._deadlines = ExpiryQueue(self._set.is_open)
        self._wait_limits = ExpiryQueue(self._set.is_new)  # until when requests may wait for their first replica
        self._supervisor = ReplicaSupervisor(
            launch,
            capacity_of,
            self._set,
            limits=limits,
            local=local,
            awaited=awaited,
            served_elsewhere=served_elsewhere,
            in_lockstep=in_lockstep,
            on_context_length=self._set_context_length,
            clock=clock,
        )
        self._supervisor.start()

    def _lost(self, number: int, error: EngineError) -> None:
        self._supervisor.lost(number, error)

    # --- requests ------------------------------------------------------------------------------------------------

    def add(self, request: EngineRequest) -> None:
        """Take a request over. If it cannot be accepted, it ends immediately with the reason in its update.

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
            request = self._limit_length(request)
        except RequestError as error:
            self._set.reject(request, error, RefusalKind.INVALID)
            return
        deadline = float("inf") if request.deadline is None else request.deadline
        if self._limits.timeout is not None:
            deadline = min(deadline, request.arrival + self._limits.timeout)
        # The deadline stays here, because the clocks of other hosts show other times.
        self._set.add(replace_fields(request, deadline=None))
        if self._set.is_new(request.seq) and self._set.num_waiting > self._limits.max_queued:
            why = f"{self._limits.max_queued} requests wait already (--max-queued-requests): try again later"
            self._set.refuse(request.seq, why, RefusalKind.FULL)
            return
        if deadline < float("inf"):
            self._deadlines.add(deadline, request.seq)
        if self._limits.max_wait is not None:
            self._wait_limits.add(now + self._limits.max_wait, request.seq)

    def _objection(self, request: EngineRequest) -> tuple[RequestError | str, RefusalKind] | None:
        """Return why a request is not accepted, however many others wait; None if it may be."""
        if self._supervisor.failure:
            return self._supervisor.failure, RefusalKind.LOST
        if not self._accepting:
            return "the server is shutting down and accepts no new requests", RefusalKind.CLOSING
        if self._set.activity.state is ActivityState.ASLEEP:
            return "the model is asleep: wake it up first (POST /wake_up)", RefusalKind.ASLEEP
        objection = self._supervisor.objection(request.replica) if request.replica >= 0 else None
        return objection or self._too_many_outputs(request)

    def _too_many_outputs(self, request: EngineRequest) -> tuple[RequestError | str, RefusalKind] | None:
        """Return why a request has too many outputs even for a fleet without other requests; None if it has not."""
        held, queued = self._supervisor.max_held(request.replica), self._limits.max_queued
        if held is None or request.outputs <= held + queued:
            return None
        why = (
            f"n times prompts makes {request.outputs} outputs, but {held + queued} are possible at a time: {held} at "
            f"replicas (--max-num-seqs) and {queued} waiting (--max-queued-requests); ask for fewer, or raise one of "
            "the two"
        )
        return RequestError(why, "n"), RefusalKind.INVALID

    @property
    def max_model_len(self) -> int | None:
        """The context length; None before the first replicas are ready."""
        return self._context_length

    def _set_context_length(self, length: int) -> None:
        self._context_length = length
        self._set.revise(self._limit_length)

    def _limit_length(self, request: EngineRequest) -> EngineRequest:
        """Return the request with an output limit that fits into the context length.

        Raises:
            RequestError: the prompt leaves no room for an output.
        """
        if self._context_length is None:
            return request
        prompt_len = request.num_prompt_tokens
        if prompt_len >= self._context_length:
            raise context_length_exceeded(
                self._context_length,
                f"the prompt has {prompt_len}, but the output needs at least one: shorten it, or give the replicas "
                "more memory for their KV caches",
            )
        return replace_fields(request, max_tokens=min(request.max_tokens, self._context_length - prompt_len))

    def refuse(self, seq: int, why: str) -> bool:
        """End a request that cannot be served. Return False if no request has this number."""
        is_open = self._set.is_open(seq)
        self._set.refuse(seq, why, RefusalKind.FAILED)
        return is_open

    def abort(self, seqs: Sequence[int], *, stopped: bool = False) -> None:
        self._set.abort(seqs, stopped=stopped)

    def updates(self, timeout: float) -> list[SeqUpdate]:
        """Drive the fleet: wait for replicas, start those that are due, and end expired requests. Return the updates.

        The wait takes at most `timeout` seconds, and ends early for a timer, a watched source or `wake`.
        """
        self._tick()
        updates = self._set.updates(min(timeout, self.seconds_until_due()))
        self._supervisor.admit_ready()
        return updates

    def _tick(self) -> None:
        now = self._clock()
        self._supervisor.tick(now)
        for seq in self._deadlines.pop_expired(now):
            self._set.refuse(seq, "the request was not finished by its deadline", RefusalKind.LATE)
        for seq in self._wait_limits.pop_expired(now):
            why = f"the request waited {self._limits.max_wait:g} s for a replica (--max-queue-wait)"
            self._set.refuse(seq, why, RefusalKind.LATE)

    def close(self) -> None:
        """End all replicas. Idempotent, never raises."""
        self._supervisor.stop_restarts()
        self._set.close()
        self._supervisor.close()
        self._waker.close()

    def audit(self) -> None:
        """Check that all tables and sums agree.

        Raises:
            EngineError: they differ; or all requests have ended, but some are still in a table.
        """
        self._set.audit()
        self._deadlines.clean()
        self._wait_limits.clean()
        if not self.num_unfinished and (self._set.num_waiting or len(self._deadlines) or len(self._wait_limits)):
            raise EngineError("all requests have ended, but some are still in a queue")

    # --- for servers and their operators ---------------------------------------------------------------------------

    @property
    def num_unfinished(self) -> int:
        return self._set.num_unfinished

    @property
    def fatal(self) -> ShoalError | None:
        """The reason why no replica can serve or come back; None while one can."""
        return self._supervisor.fatal

    @property
    def any_ready(self) -> bool:
        return self._supervisor.any_ready

    @property
    def started(self) -> bool:
        """True if every replica of this host can serve requests. Replicas that were added later do not count.

        Raises:
            UserError, EngineError: a replica of this host cannot become ready, and not all have been ready once; or no
                replica is left.
        """
        return self._supervisor.started

    def status(self) -> FleetStatus:
        return FleetStatus(
            model=self._model.name,
            tp=self._model.tp,
            pp=self._model.pp,
            replicas=self._supervisor.statuses(),
            queued=self._set.num_waiting,
            replays=self._set.replays,
            accepting=self._accepting and not self._supervisor.failure,
            uptime_s=self._clock() - self._began,
            failure=self._supervisor.failure,
            max_model_len=self._context_length or 0,
            activity=self._set.activity.state.value,
            sleep_level=self._set.activity.level,
            missing=self._set.activity.missing,
        )

    def operate(self, wanted: Operation, done: Done) -> None:
        """Begin a pause, resume, sleep, wake-up or cache reset of all replicas.

        `done` is called with the outcome, from within `updates`. Replicas that become ready later are brought to the
        same activity.

        Raises:
            ConfigError: a sleep is not possible, as replicas that are no part of this fleet are in lockstep with these.
        """
        if wanted.verb == "sleep" and wanted.level and self._needed_elsewhere:
            raise ConfigError(
                "replicas at other addresses compute in lockstep with these (--enable-expert-parallel), and cannot "
                "while these are asleep: pause instead, or serve all replicas behind one address"
            )
        self._set.operate(wanted, done)

    @property
    def traces(self) -> ReplicaTraces:
        """The traces of all replicas. What the replicas send comes with `updates`."""
        return self._set.traces

    @property
    def recorders(self) -> list[Recorder]:
        """Those who are told of all requests that are added. Others may be added and removed."""
        return self._set.recorders

    def drain(self) -> None:
        """Accept no new requests from now on."""
        self._accepting = False

    def scale(self, count: int) -> None:
        """Have `count` replicas from now on.

        More replicas are started on this host, in place of failed ones first. Too many are taken out, those with the
        highest numbers first; their requests go on at the others.

        Raises:
            ConfigError: `count` is 0, or the number of replicas in lockstep would change.
            UserError, EngineError: no replica is left.
        """
        self._supervisor.scale(count)

    def arrive(self, number: int, member: RemoteReplica) -> None:
        """Add a replica that another host has started. May be called from any thread."""
        self._supervisor.arrive(number, member)
        self.wake()

    # --- waiting ---------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """End the wait of `updates`. May be called from any thread."""
        self._waker.wake()

    def watch(self, source: Any) -> None:
        """Let `updates` return early when this source is readable, too."""
        self._sources.append(source)

    def unwatch(self, source: Any) -> None:
        if source in self._sources:
            self._sources.remove(source)

    @property
    def num_timers(self) -> int:
        """The number of deadlines and waiting limits in memory, including those of ended requests."""
        return len(self._deadlines) + len(self._wait_limits)

    def seconds_until_due(self) -> float:
        """Return the seconds until the next timer of a request or replica."""
        now = self._clock()
        times = (self._deadlines.next_time, self._wait_limits.next_time, self._supervisor.next_due)
        return max(0.0, min((time for time in times if time is not None), default=now + _IDLE_S) - now)

    def _wait_for_any(self, replicas: Sequence[ReplicaClient], timeout: float) -> None:
        channels: list[Any] = [member.channel for member in (*replicas, *self._supervisor.starting())]
        channels += [self._waker, *(source for source in self._sources if source.fileno() >= 0)]
        wait(channels, timeout)
        self._waker.clear()
