"""The launchers of replicas on this host, as engine processes or as threads, for offline runs and for fleets."""

import threading
from collections.abc import Container, Sequence

from shoal.cluster.replicas.replica import EngineProcess, EngineThread, Replica
from shoal.cluster.routing.capacity import ReplicaCapacity, max_requests_held
from shoal.engine.build import AwaitNodes, build_engine
from shoal.engine.core import EngineCore
from shoal.engine.lockstep.local import LocalLockstep
from shoal.engine.lockstep.member import LockstepMember
from shoal.engine.serve_channel import serve
from shoal.errors import ShoalError, UserError
from shoal.executors.table import thread_groups
from shoal.launch.deployment import place_of
from shoal.launch.leader import Leader
from shoal.launch.open_model import OpenModel
from shoal.log import get_logger
from shoal.transport.channel import Channel
from shoal.wire.base import replace_fields
from shoal.wire.credentials import NO_CREDENTIALS, Credentials
from shoal.wire.engine import EngineStats, NoPlan
from shoal.wire.plan import EnginePlan, ReplicaPlace

log = get_logger("replicas")

ENGINE_PROCESS = "shoal.engine.process"
_START_PHASES = 5  # each of which may take --start-timeout


class ProcessLauncher:
    """A launcher that starts each replica as an engine process.

    Replicas that share experts meet at the rendezvous every time they start. Other replicas only compare their
    agreement there, and only the first time they start.
    """

    def __init__(
        self,
        model: OpenModel,
        local: Sequence[int],
        *,
        rendezvous: str = "",
        credentials: Credentials = NO_CREDENTIALS,
        compared: Container[int] = (),
        leader: Leader | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            local: the numbers of the replicas that were planned for this host.
            rendezvous: host:port of the rendezvous; "" if replicas need not meet.
            credentials: for the rendezvous.
            compared: the numbers of the replicas that compare their agreement although they share no experts.
            leader: the leader of the nodes over which each replica is spread; None: each replica is on this host.
        """
        self._model = model
        self._local = local
        self._rendezvous = rendezvous
        self._credentials = credentials
        self._compared = compared
        self._leader = leader
        self._started: set[int] = set()  # replicas started before; those that a fleet starts again were ready once

    def __call__(self, number: int, generation: int = 0) -> Replica:
        """Start a replica.

        Args:
            generation: how many times all replicas were started again together.

        Raises:
            ConfigError: this host does not have enough memory or devices for it.
        """
        place, again = place_of(self._model.num_replicas, number, self._local), number in self._started
        if self._model.plan.layout.shares_experts or (number in self._compared and not again):
            place = replace_fields(place, rendezvous=self._rendezvous, credentials=self._credentials, returning=again)
        self._started.add(number)
        if self._leader is not None:
            return self._start_over_nodes(self._leader, replace_fields(place, returning=again))
        return EngineProcess(ENGINE_PROCESS, self._model.plan_at(place), answer_timeout=answer_timeout(self._model))

    def _start_over_nodes(self, leader: Leader, place: ReplicaPlace) -> Replica:
        """Start the engine of a replica over several hosts. It gets its plan when all nodes are there."""
        engine = EngineProcess(
            ENGINE_PROCESS,
            None,
            place=place,
            answer_timeout=answer_timeout(self._model),
            on_nodes_awaited=lambda awaited: leader.call(place.rank, awaited.address, awaited.start),
            on_dismissed=lambda: leader.release(place.rank),
        )
        # Nodes that were there before come back; for the first start of a replica, a missing node is a mistake.
        patience = float("inf") if place.returning else self._model.plan.timeouts.start_s

        def plan() -> None:
            try:
                found = leader.plan(place, patience, cancelled=lambda: engine.has_ended)
            except Exception as error:
                why = str(error) if isinstance(error, ShoalError) else f"{type(error).__name__}: {error}"
                if not isinstance(error, ShoalError):
                    log.exception("replica %d could not be planned", place.rank)
                engine.give_plan(NoPlan(why, isinstance(error, UserError)))
            else:
                engine.give_plan(found)

        threading.Thread(target=plan, name=f"shoal-plan-{place.rank}", daemon=True).start()
        return engine


class ThreadLauncher:
    """A launcher that starts each replica as threads of this process.

    Replicas that share experts get a new lockstep and new groups of threads whenever all are started again together.
    """

    def __init__(self, model: OpenModel) -> None:
        self._model = model
        self._in_lockstep = model.plan.layout.shares_experts
        self._generation = -1
        self._locksteps: list[LockstepMember] = []
        self._groups = thread_groups(model.plan.timeouts.comm_s)

    def __call__(self, number: int, generation: int = 0) -> Replica:
        """Start a replica. Arguments and errors are those of `ProcessLauncher`."""
        if generation != self._generation or not self._in_lockstep:
            self._generation = generation
            self._locksteps = [*LocalLockstep.make_all(self._model.plan.layout.replicas)] if self._in_lockstep else []
            self._groups = thread_groups(self._model.plan.timeouts.comm_s)
        locksteps, groups = self._locksteps, self._groups

        def start(plan: EnginePlan, lockstep: LockstepMember | None, _: AwaitNodes) -> EngineCore:
            return build_engine(plan, lockstep=lockstep, groups=groups)

        def run(channel: Channel) -> None:
            serve(channel, lambda plan: locksteps[plan.place.rank] if locksteps else None, start)

        plan = self._model.plan_at(place_of(self._model.num_replicas, number))
        return EngineThread(run, plan, answer_timeout=answer_timeout(self._model))


def capacity_of(model: OpenModel, stats: EngineStats) -> ReplicaCapacity:
    """Return how much a replica with these first stats can have at a time."""
    return ReplicaCapacity(
        requests=max_requests_held(model.plan.max_num_seqs),
        tokens=stats.num_blocks * stats.block_size,
        block_size=stats.block_size,
        prefix_blocks=stats.num_blocks if model.plan.prefix_caching else 0,
    )


def start_timeout(model: OpenModel) -> float:
    """Return how long an engine may take until it is ready, in seconds."""
    return model.plan.timeouts.start_s * _START_PHASES


def answer_timeout(model: OpenModel) -> float:
    """Return how long an engine may take to answer a message, in seconds. It answers between two steps."""
    return model.plan.timeouts.step_s * (model.plan.max_in_flight + 1)
