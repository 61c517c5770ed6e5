"""Replicas whose ranks form groups with each other: real engines and executors over ranks that are fakes.

Everything runs on one thread. While one engine waits for its rank, the others go on.
"""

from collections import deque
from collections.abc import Sequence

from shoal.activity import Activity
from shoal.engine.core import EngineCore
from shoal.engine.lockstep.local import LocalLockstep
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.errors import EngineError, RanksDied
from shoal.executors.base import RankExecutor
from shoal.wire.base import encode
from shoal.wire.engine import EngineRequest
from shoal.wire.ranks import (
    Capacity,
    FromRank,
    LoadInfo,
    RankCall,
    RankReply,
    RankReport,
    RankSetup,
    RankStats,
    StepPlan,
    ToRank,
)
from support.fakes import FakeExecutor, Outcomes
from support.plans import bare_plan, setup_of

MAX_MODEL_LEN = 64
_TOGETHER = ("connect", "warm_up", "step")  # what ranks do together
_NUM_BLOCKS = 16
_TIMEOUT_S = 20.0  # of a test that waits for ever


class SharedRank:
    """The `Links` to the only rank of a replica, whose groups have the ranks of the other replicas too."""

    world_size = 1

    def __init__(self, replicas: "SharedReplicas", number: int) -> None:
        self.model = FakeExecutor(_NUM_BLOCKS, 4)
        self.pid = 1000 * (number + 1)
        self.loads = 0  # of this process
        self.dead = False
        self.incarnation = -1
        self.begun: list[str] = []  # what it has begun together with the others in this incarnation
        self.num_ended = 0  # how much of that has ended
        self._replicas = replicas
        self._number = number
        self._inbox: deque[RankCall | StepPlan] = deque()
        self._lost_contact = False  # it has reported that, and does nothing until its next setup

    def kill(self) -> None:
        self.dead = True

    def send(self, message: ToRank, rank: int | None = None) -> None:
        match message:
            case RankSetup():
                self._inbox.clear()
                self.begun, self.num_ended, self._lost_contact = [], 0, False
                if self.incarnation >= 0:
                    self.model.reform(message.incarnation, self.model.missing if self.loads else ())
                self.incarnation = message.incarnation
            case StepPlan():
                self.model.launch(message)
                self._inbox.append(message)
            case RankCall():
                self._inbox.append(message)

    def receive(self, timeout: float) -> list[FromRank]:
        if self.dead:
            raise RanksDied(f"rank 0 (process {self.pid}) was killed by SIGKILL", (0,))
        found: list[FromRank] = []
        while self._inbox and not self._lost_contact:
            message = self._inbox[0]
            name = "step" if isinstance(message, StepPlan) else message.verb
            if name in _TOGETHER and not self._replicas.starting:
                if self._replicas.has_left(self._number) and name != "connect":
                    self._lost_contact = True
                    error = "all_to_all failed: connection closed by peer"
                    found.append(RankReport(0, 0, error, communication=True, incarnation=self.incarnation))
                    break
                if not self._do_together(name):
                    break
            self._inbox.popleft()
            found.append(self._answer(message))
        if not found and timeout > 0:
            self._replicas.step_all()
        return found

    def _do_together(self, name: str) -> bool:
        """Take part in what all ranks do, and return whether all others take part too."""
        if len(self.begun) == self.num_ended:
            self.begun.append(name)
        others = [rank for rank in self._replicas.ranks if rank.incarnation == self.incarnation and not rank.dead]
        there = [rank.begun[self.num_ended] for rank in others if len(rank.begun) > self.num_ended]
        assert set(there) == {name}, f"the ranks do {there} at the same time, and would wait for ever"
        ended = len(there) == len(self._replicas.ranks)
        self.num_ended += ended
        return ended

    def _answer(self, message: RankCall | StepPlan) -> FromRank:
        if isinstance(message, StepPlan):
            return self.model.poll(0)[0]
        payload = b""
        match message.verb:
            case "load":
                kept = bool(self.loads) and "weights" not in self.model.missing
                self.loads += not kept
                self.model.missing.discard("weights")
                payload = encode(LoadInfo(0, "cpu", 0, 1, 1, 1, 0, 1, 1, "", "", "", weights_kept=kept))
            case "profile":
                payload = encode(Capacity(0, _NUM_BLOCKS, 1))
            case "allocate":
                self.model.missing.discard("kv_cache")
            case "stats":
                payload = encode(RankStats(0, self.pid, 2, 3, 4, 5, loads=self.loads))
            case "sleep" | "wake_up":
                (payload,) = self.model.call(message.verb, message.payload, timeout=0)
                self.loads += message.verb == "wake_up" and b"weights" in message.payload
        return RankReply(message.id, 0, payload)

    def keep_spares(self) -> None:
        """Do nothing: there are no processes."""

    def replace(self, ranks: Sequence[int]) -> None:
        if ranks:
            self.dead, self.loads, self.pid = False, 0, self.pid + 1

    def stuck(self, seconds: float, step: int) -> list[int]:
        return []

    def describe(self, rank: int) -> str:
        return f"process {self.pid}"

    def close(self, *, failed: bool) -> None:
        self.dead = True


class SharedReplicas:
    """Replicas in lockstep, which are driven in any order."""

    def __init__(self, size: int, *, depth: int = 2) -> None:
        self.starting = True
        self.lockstep = LocalLockstep.make_all(size)
        self.ranks = [SharedRank(self, number) for number in range(size)]
        self.cores = [self._start(number, depth) for number in range(size)]
        self.starting = False
        self.outcomes = Outcomes()
        self.failures: dict[int, str] = {}
        self.placed: dict[int, int] = {}
        self.activity = Activity()
        self._driven: set[int] = set()

    def _start(self, number: int, depth: int) -> EngineCore:
        lockstep = self.lockstep[number]
        setups = [setup_of(bare_plan(), incarnation=lockstep.incarnation)]
        executor = RankExecutor(
            self.ranks[number],
            setups,
            check_capacity=lambda _: None,
            start_timeout=_TIMEOUT_S,
            step_timeout=_TIMEOUT_S,
            peers=lockstep,
        )
        return EngineCore(
            executor,
            SchedulerLimits(8, 64, MAX_MODEL_LEN),
            block_size=4,
            prefix_caching=True,
            max_in_flight=depth,
            incarnation=lockstep.incarnation,
            lockstep=lockstep,
        )

    def has_left(self, number: int) -> bool:
        """Return whether a rank of another replica has died, or has a newer incarnation than the rank of this one."""
        own = self.ranks[number]
        return any(rank.dead or rank.incarnation > own.incarnation for rank in self.ranks if rank is not own)

    def add(self, replica: int, spec: EngineRequest) -> None:
        self.cores[replica].add(spec)
        self.placed[spec.seq] = replica
        self.outcomes.added(spec)

    def step(self, replica: int) -> None:
        """Drive an engine as its owner does, unless it is being driven or has failed."""
        if replica in self._driven or replica in self.failures:
            return
        self._driven.add(replica)
        core = self.cores[replica]
        try:
            if core.busy:
                self.outcomes.take(core.updates(0))
            else:
                core.check()
        except EngineError as error:
            self.failures[replica] = str(error)
            self.lockstep[replica].close(f"replica {replica}: {error}")
        finally:
            self._driven.discard(replica)

    def step_all(self) -> None:
        for replica in range(len(self.cores)):
            self.step(replica)

    def change_to(self, activity: Activity, *, then: "dict[int, int]" = {}) -> None:  # noqa: B006 (never written)
        """Change the activity of all replicas, each step of the change on one after the other, as a fleet does.

        Args:
            then: after so many of these changes, the rank of this replica is killed.
        """
        count = 0
        for each in self.activity.steps_to(activity):
            for replica, core in enumerate(self.cores):
                self._driven.add(replica)
                core.set_activity(each)
                self._driven.discard(replica)
                count += 1
                if count in then:
                    self.ranks[then[count]].kill()
        self.activity = activity

    def settle(self, limit: int = 5000) -> None:
        """Drive all engines until they rest."""
        for _ in range(limit):
            self.step_all()
            if self.failures or not any(core.busy for core in self.cores):
                break
        assert self.failures == {}

    def drain(self) -> None:
        """Drive all engines until all requests have ended."""
        self.settle()
        assert self.outcomes.open == []
        assert len({rank.incarnation for rank in self.ranks}) == 1
        assert len({tuple(rank.begun) for rank in self.ranks}) == 1, "all rest after the same steps"

    def close(self) -> None:
        for core in self.cores:
            core.close()
        for lockstep in self.lockstep:
            lockstep.close()
