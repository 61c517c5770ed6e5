"""A fleet to which random things happen: every request ends once, with the right tokens."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import CheckpointError, ConfigError, EngineError
from shoal.wire.base import replace_fields
from shoal.wire.engine import RefusalKind, SeqUpdate
from shoal.wire.fleet import Operation
from support.fakes import request, steady
from support.fleet_world import NEVER, FakeMember, FleetWorld, world

OPERATIONS = [
    Operation("pause", mode="keep"),
    Operation("pause", mode="wait"),
    Operation("pause", mode="abort"),
    Operation("resume"),
    Operation("sleep", mode="keep"),
    Operation("sleep", mode="abort", level=2),
    Operation("wake_up"),
    Operation("wake_up", tags=("weights",)),
    Operation("reset_prefix_cache"),
]


class Chaos:
    """A fleet to which random things happen."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.in_lockstep = data.draw(st.booleans(), "in_lockstep")
        self.awaited = [] if self.in_lockstep else data.draw(st.sampled_from([[], [2], [2, 3]]), "awaited")
        self.limits: dict[str, Any] = {
            "max_queued": data.draw(st.sampled_from([0, 2, 1000]), "max_queued"),
            "max_wait": data.draw(st.sampled_from([None, 3.0]), "max_wait"),
            "timeout": data.draw(st.sampled_from([None, 20.0]), "timeout"),
            "max_restarts": data.draw(st.sampled_from([0, 2, 50]), "max_restarts"),
        }
        self.world = FleetWorld(
            data.draw(st.integers(1, 3), "local"),
            awaited=self.awaited,
            in_lockstep=self.in_lockstep,
            most=data.draw(st.integers(1, 4), "most"),
            polls=lambda: data.draw(st.integers(0, 3), "polls"),
            fails=self.fails,
            **self.limits,
        )
        self.starts_fail = False
        self.scaled = self.drained = self.slept = self.aborts = False
        self.seqs = 0
        self.outcomes_of_operations: list[Any] = []

    def fails(self, number: int, generation: int) -> Exception | None:
        if not getattr(self, "starts_fail", False) or self.data.draw(st.integers(0, 5), "fails"):
            return None
        return self.data.draw(st.sampled_from([OSError("no memory"), EngineError("no"), CheckpointError("bad")]), "why")

    def act(self) -> None:
        often = [self.add, self.add, self.add, self.wait, self.wait]
        actions = [*often, self.kill, self.abort, self.scale, self.arrive, self.operate]
        self.data.draw(st.sampled_from(actions), "action")()

    def operate(self) -> None:
        wanted = self.data.draw(st.sampled_from(OPERATIONS), "operation")
        self.slept |= wanted.verb == "sleep"
        if wanted.mode == "abort" and wanted.verb in ("pause", "sleep"):
            self.aborts = True
        if self.aborts:  # requests that arrive before the operation begins are aborted too
            self.world.outcomes.may_abort.update(self.world.outcomes.specs)
        self.world.fleet.operate(wanted, self.outcomes_of_operations.append)

    def add(self) -> None:
        draw, now = self.data.draw, self.world.clock.now
        prompt = draw(st.lists(st.integers(0, 5), min_size=1, max_size=9), "prompt")
        spec = request(
            self.seqs,
            prompt,
            draw(st.integers(1, 30), "length"),
            stop_ids=draw(st.sampled_from([[], [3]]), "stop"),
            deadline=draw(st.sampled_from([None, None, now + 5, now - 1]), "deadline"),
        )
        self.seqs += 1
        self.world.add(replace_fields(spec, replica=draw(st.sampled_from([-1, -1, -1, 0, 1, 2, 7]), "replica")))

    def kill(self) -> None:
        if self.world.alive:
            self.world.kill(self.data.draw(st.sampled_from(self.world.alive), "victim"))

    def abort(self) -> None:
        if self.world.outcomes.open:
            seq = self.data.draw(st.sampled_from(self.world.outcomes.open), "aborted")
            self.world.outcomes.may_abort.add(seq)
            self.world.fleet.abort([seq, 999, seq])

    def wait(self) -> None:
        self.world.step(self.data.draw(st.sampled_from([0.0, 0.3, 2.0, 40.0]), "seconds"))

    def scale(self) -> None:
        try:
            self.world.fleet.scale(self.data.draw(st.integers(1, 4), "count"))
            self.scaled = True
        except (ConfigError, EngineError, CheckpointError):
            assert self.in_lockstep or self.world.fleet.fatal

    def arrive(self) -> None:
        if self.awaited:
            member = FakeMember(self.data.draw(st.sampled_from(self.awaited), "arrival"))
            self.world.members.append(member)
            self.world.fleet.arrive(member.number, member)

    def check(self) -> None:
        for update in self.world.outcomes.finished.values():
            self.check_end(update)
        running = [m for m in self.world.alive if self.world.state(m.number) == "ready" and not m.leaving]
        assert not self.in_lockstep or len({member.generation for member in running}) <= 1

    def check_end(self, update: SeqUpdate) -> None:
        spec = self.world.outcomes.specs[update.seq]
        pin = spec.replica >= 0
        match update.refusal:
            case RefusalKind.INVALID:
                assert pin
            case RefusalKind.FULL:
                assert self.limits["max_queued"] < 1000
            case RefusalKind.LATE:
                assert spec.deadline or self.limits["max_wait"] or self.limits["timeout"]
            case RefusalKind.FAILED:
                assert self.world.deaths[update.seq] >= 3
            case RefusalKind.LOST:
                assert self.world.fleet.fatal or pin
            case RefusalKind.CLOSING:
                assert self.drained
            case RefusalKind.ASLEEP:
                assert self.slept

    def end(self) -> None:
        """Let all requests end: nothing dies any more, and all awaited replicas arrive."""
        self.starts_fail = False
        self.world.fleet.operate(Operation("wake_up"), self.outcomes_of_operations.append)
        for number in self.awaited:
            if self.world.state(number) == "awaited":
                self.world.members.append(FakeMember(number))
                self.world.fleet.arrive(number, self.world.members[-1])
        if self.data.draw(st.booleans(), "drain"):
            self.drained = True
            self.world.fleet.drain()
            self.add()
        self.world.finish()
        self.check()


@pytest.mark.slow
@given(data=st.data())
@settings(steady, max_examples=200)
def test_every_request_ends_exactly_once_whatever_dies(data: st.DataObject) -> None:
    chaos = Chaos(data)
    try:
        chaos.starts_fail = True
        for _ in range(data.draw(st.integers(1, 40), "steps")):
            chaos.act()
            chaos.world.fleet.audit()
            chaos.check()
        chaos.end()
    finally:
        chaos.world.close()


@pytest.mark.slow
@given(data=st.data())
@settings(steady, max_examples=40)
def test_deaths_with_progress_in_between_change_no_output(data: st.DataObject) -> None:
    """Without a limit on restarts and without deadlines, all outputs are the same as without deaths."""
    with world(data.draw(st.integers(1, 3)), in_lockstep=data.draw(st.booleans()), max_restarts=NEVER) as found:
        found.settle(3)
        for seq in range(data.draw(st.integers(1, 8))):
            found.add(request(seq, [seq % 3, 1], data.draw(st.integers(60, 90))))
        for _ in range(data.draw(st.integers(1, 6))):
            found.settle(40, 1.0)  # at least 16 tokens for each that runs
            if found.alive:
                found.kill(data.draw(st.sampled_from(found.alive)))
        found.finish()
        assert not any(found.refusals().values())
