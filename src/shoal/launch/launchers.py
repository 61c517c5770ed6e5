"""Starts replicas of this host, for offline runs and for a fleet alike: as engine processes, or as threads."""

from collections.abc import Container, Sequence

from shoal.cluster.lockstep.local import Joined, LocalLockstep
from shoal.cluster.members.replica import EngineProcess, EngineThread, Replica
from shoal.cluster.routing.router import ReplicaCapacity, most_held
from shoal.engine.build import build_engine
from shoal.engine.core import EngineCore
from shoal.engine.server import serve
from shoal.executors.table import thread_groups
from shoal.launch.open_model import OpenModel
from shoal.transport.channel import Channel
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineStats
from shoal.wire.plan import EnginePlan, ReplicaPlace

ENGINE_PROCESS = "shoal.engine.process"
_START_PHASES = 5  # each of which may take --start-timeout


class ProcessLauncher:
    """Starts each replica as an engine process.

    Replicas that share experts meet at the `rendezvous` whenever they start. Others that have one only compare there
    what they must have in common, the first time they start, and only if their number is in `compared`.
    """

    def __init__(
        self,
        model: OpenModel,
        local: Sequence[int],
        *,
        rendezvous: str = "",
        key: str = "",
        compared: Container[int] = (),
    ) -> None:
        """`local`: the numbers of the replicas that were planned for this host."""
        self._model = model
        self._local = local
        self._rendezvous = rendezvous
        self._key = key
        self._compared = compared
        self._started: set[int] = set()  # a fleet starts only those again that have been ready

    def __call__(self, number: int, generation: int = 0) -> Replica:
        """Start a replica. Its `generation` counts the times at which all replicas were started anew together.

        Raises:
            ConfigError: this host has not enough memory or devices for it.
        """
        place, again = place_of(self._model, number, self._local), number in self._started
        if self._model.plan.layout.shares_experts or (number in self._compared and not again):
            place = replace_fields(place, rendezvous=self._rendezvous, key=self._key, returning=again)
        self._started.add(number)
        return EngineProcess(ENGINE_PROCESS, self._model.plan_at(place), answer_timeout=answer_timeout(self._model))


class ThreadLauncher:
    """Starts each replica as threads of this process. Those that share experts have a lockstep and groups for each
    generation."""

    def __init__(self, model: OpenModel) -> None:
        self._model = model
        self._together = model.plan.layout.shares_experts
        self._generation = -1
        self._locksteps: list[Joined] = []
        self._groups = thread_groups(model.plan.timeouts.comm_s)

    def __call__(self, number: int, generation: int = 0) -> Replica:
        """As `ProcessLauncher`."""
        if generation != self._generation or not self._together:
            self._generation = generation
            self._locksteps = [*LocalLockstep.of(self._model.plan.layout.replicas)] if self._together else []
            self._groups = thread_groups(self._model.plan.timeouts.comm_s)
        locksteps, groups = self._locksteps, self._groups

        def start(plan: EnginePlan, lockstep: Joined | None) -> EngineCore:
            return build_engine(plan, lockstep=lockstep, groups=groups)

        def run(channel: Channel) -> None:
            serve(channel, lambda plan: locksteps[plan.place.rank] if locksteps else None, start)

        plan = self._model.plan_at(place_of(self._model, number))
        return EngineThread(run, plan, answer_timeout=answer_timeout(self._model))


def place_of(model: OpenModel, number: int, local: Sequence[int] | None = None) -> ReplicaPlace:
    """Return the place of one replica. `local` are those on this host; without it, all are.

    A number beyond those that were planned is that of a replica that was added later.
    """
    size = max(model.options.parallel.data_parallel_size, number + 1)
    if local is None or len(local) == size:
        return ReplicaPlace(number, size, local_rank=number, local_size=size)
    position = local.index(number) if number in local else len(local)
    return ReplicaPlace(number, size, local_rank=position, local_size=max(len(local), position + 1))


def capacity_of(model: OpenModel, stats: EngineStats) -> ReplicaCapacity:
    """Return what a replica that has told its `stats` can use at a time."""
    return ReplicaCapacity(
        requests=most_held(model.plan.max_num_seqs),
        tokens=stats.num_blocks * stats.block_size,
        block_size=stats.block_size,
        prefixes=stats.num_blocks if model.plan.prefix_caching else 0,
    )


def start_timeout(model: OpenModel) -> float:
    """Return the seconds within which an engine must be ready."""
    return model.plan.timeouts.start_s * _START_PHASES


def answer_timeout(model: OpenModel) -> float:
    """Return the seconds within which an engine must answer, which it does between steps."""
    return model.plan.timeouts.step_s * (model.plan.max_in_flight + 1)
