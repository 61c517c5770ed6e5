"""A fleet of fake replicas on a clock of its own, driven by hand."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shoal.cluster.fleet import Fleet, ModelSummary
from shoal.cluster.limits import FleetLimits
from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.errors import ShoalError
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest, EngineStats, Finish, RefusalKind, SeqUpdate
from support.fake_replica import STATS, FakeReplica
from support.fakes import FakeClock, Outcomes, request

NEVER = 10**9
LONG = 300  # tokens: more than are drawn


class SilentChannel:
    """A channel that is never readable."""

    backlog = False

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd


SILENT_CHANNEL = SilentChannel()


class FakeMember(FakeReplica):
    """A replica that becomes ready after `polls` calls of `ready`, and ends after as many calls of `has_ended`."""

    def __init__(self, number: int, generation: int = 0, polls: int = 0) -> None:
        super().__init__(number, seed=number)
        self.number = number
        self.generation = generation
        self.polls = polls
        self.host, self.pid = "elsewhere", 4711
        self.leaving = False
        self.error: ShoalError | None = None  # the failure of its start
        self.may_block = False  # True: the caller may wait for its end
        self.holds = STATS.max_model_len  # the most tokens of a request

    @property
    def channel(self) -> Any:
        assert not self.closed, "the channel of an ended replica is waited for"
        return SILENT_CHANNEL

    def ready(self, timeout: float) -> EngineStats | None:
        assert timeout == 0, "the fleet must not wait for one replica alone"
        self._check_alive()
        if self.error is not None:
            raise self.error
        self.polls -= 1
        return replace_fields(STATS, max_model_len=self.holds) if self.polls < 0 else None

    @property
    def has_ended(self) -> bool:
        self.polls -= 1
        return self.closed or bool(self.dead) or (self.leaving and self.polls < 0)

    def say_goodbye(self) -> None:
        self.leaving = True

    def end(self, deadline: float) -> None:
        assert self.may_block, "the fleet must not wait for the end of one replica while there are others"
        super().end(deadline)


class CheckingRecorder:
    """A recorder that checks that each request begins once and ends once."""

    def __init__(self) -> None:
        self.begun: set[int] = set()
        self.ends: set[int] = set()

    def added(self, request: EngineRequest) -> None:
        assert request.arrival
        assert request.seq not in self.begun
        self.begun.add(request.seq)

    def dispatched(self, seq: int, replica: int) -> None:
        assert seq in self.begun - self.ends

    def updated(self, replica: int, update: SeqUpdate) -> None:
        assert update.seq in self.begun - self.ends
        if update.finish is not None:
            self.ends.add(update.seq)

    def stopped(self, seq: int) -> None:
        assert seq in self.begun - self.ends

    def ended(self, update: SeqUpdate) -> None:
        assert update.seq in self.begun - self.ends
        self.ends.add(update.seq)


class FleetWorld:
    """A fleet of fakes on a clock of its own, and all replicas that it has started."""

    def __init__(
        self,
        local: int = 2,
        *,
        awaited: Sequence[int] = (),
        served_elsewhere: Sequence[int] = (),
        in_lockstep: bool = False,
        most: int = 3,
        polls: Callable[[], int] = lambda: 0,
        fails: Callable[[int, int], Exception | None] = lambda number, generation: None,
        holds: dict[int, int] | None = None,
        **limits: Any,
    ) -> None:
        self.clock = FakeClock()
        self.members: list[FakeMember] = []  # in the order of their starts
        self.outcomes = Outcomes()
        self.recorder = CheckingRecorder()
        self.deaths: Counter[int] = Counter()
        self.polls, self.fails, self.holds = polls, fails, holds or {}
        fleet_limits: dict[str, Any] = {
            "max_queued": 1000,
            "max_wait": None,
            "timeout": None,
            "max_restarts": 20,
            "start_timeout": 600.0,
            **limits,
        }
        self.fleet = Fleet(
            self._launch,
            lambda stats: ReplicaCapacity(most, 10**6, 4, 100),
            model=ModelSummary("model", 1, 1),
            limits=FleetLimits(**fleet_limits),
            local=range(local),
            awaited=awaited,
            served_elsewhere=served_elsewhere,
            in_lockstep=in_lockstep,
            recorder=self.recorder,
            clock=self.clock,
        )

    def _launch(self, number: int, generation: int) -> FakeMember:
        return self.launch(number, generation)

    def launch(self, number: int, generation: int) -> FakeMember:
        error = self.fails(number, generation)
        if isinstance(error, OSError):
            raise error
        self.members.append(FakeMember(number, generation, self.polls()))
        self.members[-1].holds = self.holds.get(number, STATS.max_model_len)
        if isinstance(error, ShoalError):
            self.members[-1].error = error
        return self.members[-1]

    def member(self, number: int) -> FakeMember:
        """Return the latest replica with this number."""
        return [member for member in self.members if member.number == number][-1]

    @property
    def alive(self) -> list[FakeMember]:
        return [member for member in self.members if not member.dead and not member.closed]

    def kill(self, member: FakeMember) -> None:
        member.dead = "was killed by SIGKILL"
        self.deaths.update(member.held.keys())

    def state(self, number: int) -> str:
        return next((each.state for each in self.fleet.status().replicas if each.number == number), "")

    def add(self, spec: EngineRequest) -> None:
        self.outcomes.added(spec)
        self.fleet.add(spec)

    def step(self, seconds: float = 0.0) -> list[SeqUpdate]:
        self.clock.now += seconds
        updates = self.fleet.updates(0)
        for update in updates:
            assert bool(update.error) == (update.refusal is not RefusalKind.NONE), update
            if update.error:
                assert update.finish is Finish.ABORT
                self.outcomes.may_abort.add(update.seq)
        self.outcomes.take(updates)
        return updates

    def settle(self, rounds: int = 20, seconds: float = 0.0) -> None:
        for _ in range(rounds):
            self.step(seconds)

    def refusals(self) -> dict[int, RefusalKind]:
        return {seq: update.refusal for seq, update in self.outcomes.finished.items()}

    def error(self, seq: int) -> str:
        return self.outcomes.finished[seq].error

    def finish(self, seconds: float = 1.0) -> None:
        for _ in range(400):
            if not self.outcomes.open:
                break
            self.step(seconds)
        assert not self.outcomes.open, "a request has no end"
        self.fleet.audit()
        assert self.recorder.begun == self.recorder.ends == set(self.outcomes.specs)

    def close(self) -> None:
        for member in self.members:
            member.may_block = True
        self.fleet.close()
        self.fleet.close()
        assert all(member.closed for member in self.members)


@contextmanager
def world(local: int = 2, **options: Any) -> Iterator[FleetWorld]:
    found = FleetWorld(local, **options)
    try:
        yield found
    finally:
        found.close()


def pinned(seq: int, replica: int, max_tokens: int = 4) -> EngineRequest:
    return replace_fields(request(seq, [seq, 1], max_tokens), replica=replica)


class Hanging(FakeMember):
    """A replica that accepts requests and sends nothing."""

    def updates(self, timeout: float) -> list[SeqUpdate]:
        self._check_alive()
        return []
