"""A fleet: which requests it accepts, how long they wait, and how long they may be."""

import pytest

from shoal.errors import RequestError
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest, Finish, RefusalKind, SeqUpdate
from support.fakes import request
from support.fleet_world import LONG, NEVER, FakeMember, pinned, world

# --- limits of the queue, and deadlines ----------------------------------------------------------------------------


@pytest.mark.parametrize(("replicas", "replica", "most"), [(1, -1, 3), (2, -1, 4), (2, 1, 3)])
def test_more_outputs_than_the_fleet_can_ever_hold_are_refused(replicas: int, replica: int, most: int) -> None:
    """Each replica may have one request, and two may wait."""
    with world(replicas, most=1, max_queued=2) as found:
        found.settle(replicas + 1)
        for seq, outputs in enumerate((most + 1, most)):
            found.add(replace_fields(request(seq, [seq]), outputs=outputs, replica=replica))
        found.step()
        assert found.refusals() == {0: RefusalKind.INVALID}
        assert f"makes {most + 1} outputs, but {most} are possible at a time" in found.error(0)
        found.finish()


def test_before_a_replica_was_ready_no_number_of_outputs_is_refused() -> None:
    with world(1, most=1, max_queued=2) as found:
        found.add(replace_fields(request(0, [0]), outputs=9))
        assert not found.refusals()
        found.finish()


def test_a_full_queue_refuses_requests_and_keeps_the_others() -> None:
    with world(1, most=1, max_queued=2) as found:
        found.settle(2)
        for seq in range(6):
            found.add(request(seq, [seq]))
        found.step()
        refused = {seq for seq, refusal in found.refusals().items() if refusal is RefusalKind.FULL}
        assert refused == {3, 4, 5}
        assert "2 requests wait already (--max-queued-requests)" in found.error(3)
        found.finish()


def test_refused_requests_do_not_delay_the_others() -> None:
    with world(1, most=1, max_queued=0) as found:
        found.settle(2)
        found.add(request(0, [1], 5))
        for seq in range(1, 60):
            found.add(request(seq, [seq]))
            found.step()
        assert found.outcomes.finished[0].finish is Finish.LENGTH


def test_a_request_waits_for_its_first_replica_up_to_the_limit() -> None:
    with world(1, most=1, max_wait=3.0) as found:
        found.settle(2)
        found.add(request(0, [1], LONG))
        found.add(request(1, [2]))
        found.settle(2, 1.0)
        found.add(request(2, [2]))
        found.settle(2, 0.5)
        assert found.refusals() == {1: RefusalKind.LATE}
        assert "waited 3 s for a replica (--max-queue-wait)" in found.error(1)


def test_the_waiting_limit_is_only_for_the_first_replica() -> None:
    with world(1, max_wait=3.0) as found:
        found.add(request(0, [1], 60))
        found.settle(20)
        found.polls = lambda: 10
        found.kill(found.member(0))
        found.finish(1.0)
        assert found.refusals() == {0: RefusalKind.NONE}


@pytest.mark.parametrize("options", [{"timeout": 5.0}, {}])
def test_a_request_ends_at_its_deadline_wherever_it_is(options: dict[str, float]) -> None:
    with world(1, most=1, **options) as found:
        deadline = None if options else found.clock.now + 5
        found.settle(2)
        for seq in range(2):
            found.add(request(seq, [seq], LONG, deadline=deadline))
        found.settle(4, 1.0)
        assert not found.refusals()
        found.settle(2, 0.5)
        assert found.refusals() == {0: RefusalKind.LATE, 1: RefusalKind.LATE}
        found.settle(2)
        assert not found.members[0].held, "the replica was not told"
        assert all(spec.deadline is None for spec in found.members[0].added)


def test_timers_of_ended_requests_do_not_stay_in_memory() -> None:
    with world(1, timeout=1e6, max_wait=1e6) as found:
        found.add(request(0, [1], LONG))
        for seq in range(1, 2000):
            found.add(request(seq, [1], 1))
            while seq in found.outcomes.open:
                found.step()
        assert found.fleet.num_timers < 300


def test_a_draining_fleet_accepts_no_new_requests() -> None:
    with world(1) as found:
        found.add(request(0, [1]))
        found.fleet.drain()
        found.add(request(1, [1]))
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE, 1: RefusalKind.CLOSING}
        assert not found.fleet.status().accepting
        assert [spec.seq for spec in found.members[0].added] == [0]


def test_a_number_in_use_is_refused() -> None:
    with world(1) as found:
        found.add(request(0, [1], 50))
        with pytest.raises(RequestError, match="request 0 exists already"):
            found.fleet.add(request(0, [2]))
        found.fleet.drain()
        with pytest.raises(RequestError, match="request 0 exists already"):
            found.fleet.add(request(0, [2]))
        found.finish()


class Deadly(FakeMember):
    def updates(self, timeout: float) -> list[SeqUpdate]:
        if 0 in self.held:
            self.dead = "was killed by SIGSEGV"
        return super().updates(timeout)


def test_a_request_that_kills_replicas_ends_alone_after_three_deaths() -> None:
    with world(2, most=1) as found:
        launch = found.launch

        def deadly(number: int, generation: int) -> FakeMember:
            member = launch(number, generation)
            member.__class__ = Deadly
            return member

        found.launch = deadly  # type: ignore[method-assign]
        for member in found.members:
            member.__class__ = Deadly
        for seq in range(6):
            found.add(request(seq, [seq], 9))
        found.finish()
        assert {seq for seq, refusal in found.refusals().items() if refusal} == {0}
        assert found.refusals()[0] is RefusalKind.FAILED
        assert "3 replicas failed one after the other while they had this request" in found.error(0)
        assert found.fleet.fatal is None


# --- requests that name their replica ---------------------------------------------------------------------------------


def test_a_request_that_names_a_replica_waits_for_it() -> None:
    with world(2) as found:
        found.settle(2)
        found.add(request(9, [1], 40))
        found.add(pinned(0, 1, 60))
        found.settle(30)
        found.polls = lambda: 30
        found.kill(found.member(1))
        found.settle(5)
        assert found.outcomes.open
        assert found.state(1) == "starting"
        found.finish()
        assert [spec.seq for spec in found.members[0].added] == [9]
        assert not any(found.refusals().values())


def test_a_request_that_names_an_unknown_replica_is_refused() -> None:
    with world(2) as found:
        found.add(pinned(0, 5))
        found.finish()
        assert found.refusals() == {0: RefusalKind.INVALID}
        assert found.error(0) == "there is no replica 5, only 0, 1"


def test_a_request_that_names_a_failed_replica_ends() -> None:
    with world(2, max_restarts=0) as found:
        found.settle(2)
        found.add(pinned(0, 1, 60))
        found.settle(5)
        found.kill(found.member(1))
        found.settle(5)
        found.add(pinned(1, 1))
        found.finish()
        assert found.refusals() == {0: RefusalKind.LOST, 1: RefusalKind.LOST}
        assert "is not started again" in found.error(0)
        assert "was killed by SIGKILL" in found.error(1)


def test_a_request_that_names_a_replica_ends_when_that_is_taken_out() -> None:
    with world(2) as found:
        found.settle(2)
        found.add(pinned(0, 1, LONG))
        found.settle(3)
        found.fleet.scale(1)
        found.add(pinned(1, 1))
        found.finish()
        assert found.refusals() == {0: RefusalKind.LOST, 1: RefusalKind.INVALID}


# --- the context length ---------------------------------------------------------------------------------------------


def test_requests_are_limited_to_what_all_replicas_hold() -> None:
    """This holds for requests that arrive before and after the first replica is ready."""
    with world(2, polls=iter([2, 6]).__next__, holds={0: 24, 1: 20}, max_model_len=100) as found:
        early, too_long = request(0, [1] * 5, 50), request(1, [1] * 20, 1)
        for spec in (early, too_long):
            found.fleet.add(spec)
        updates = found.fleet.updates(0)
        for _ in range(4):
            updates += found.fleet.updates(0)
            assert not found.members[0].added, "the other replica, which is still starting, may hold less"
        for _ in range(9):
            updates += found.fleet.updates(0)
        assert found.fleet.status().max_model_len == 20
        found.fleet.add(request(2, [1] * 5, 50))
        found.fleet.add(request(3, [1] * 5, 6))
        found.fleet.add(request(4, [1] * 20))
        found.fleet.audit()
        for _ in range(40):
            updates += found.fleet.updates(0)
        lengths = {spec.seq: spec.max_tokens for member in found.members for spec in member.added}
        assert lengths == {0: 15, 2: 15, 3: 6}
        ends = {update.seq: update for update in updates if update.finish is not None}
        assert {seq: end.refusal for seq, end in ends.items() if end.error} == {
            1: RefusalKind.INVALID,
            4: RefusalKind.INVALID,
        }
        assert (
            "this model's maximum context length is 20 tokens; the prompt has 20, but the output needs at least one"
            in ends[1].error
        )
        found.fleet.audit()


def test_a_replica_that_holds_the_planned_length_waits_for_no_other() -> None:
    with world(2, polls=iter([0, NEVER]).__next__, holds={0: 100}, max_model_len=100) as found:
        found.add(request(0, [1]))
        found.finish()


def test_the_fleet_stays_started_while_an_added_replica_starts() -> None:
    with world(1, polls=iter([0, 5]).__next__) as found:
        found.settle(2)
        assert found.fleet.started
        found.fleet.scale(2)
        for _ in range(3):
            assert found.fleet.started
            found.settle(1)
        assert [found.state(0), found.state(1)] == ["ready", "starting"]
        found.settle(9)
        found.kill(found.member(1))
        found.settle(1)
        assert not found.fleet.started, "a replica that was ready is down"


def test_an_added_replica_that_holds_less_is_not_admitted() -> None:
    with world(1, holds={0: 100, 1: 60}, max_model_len=100) as found:
        found.settle(2)
        assert found.fleet.started
        found.fleet.scale(2)
        found.add(request(0, [1] * 50, 50))
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE}
        (first, second) = found.fleet.status().replicas
        assert (first.state, second.state) == ("ready", "failed")
        assert (
            "holds requests of 60 tokens, but the context length is 100: start the server with --max-model-len 60"
            in second.cause
        )
        assert found.members[1].closed
        assert not found.members[1].added
        assert found.fleet.started, "a replica that was added later does not count"


def test_an_arriving_replica_that_holds_less_is_dismissed() -> None:
    with world(1, awaited=[1], holds={0: 100}, max_model_len=100) as found:
        found.settle(2)
        member = FakeMember(1)
        member.holds = 99
        found.members.append(member)
        found.fleet.arrive(1, member)
        found.settle(3)
        assert member.leaving
        assert found.state(1) == "awaited"


class Choosy(FakeMember):
    def add(self, spec: EngineRequest) -> None:
        if spec.seq == 1:
            raise OverflowError("too large a number")
        super().add(spec)


def test_a_request_that_cannot_be_sent_ends_alone() -> None:
    with world(1, most=1) as found:
        found.settle(2)
        found.members[0].__class__ = Choosy
        for seq in range(3):
            found.add(request(seq, [seq]))
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE, 1: RefusalKind.FAILED, 2: RefusalKind.NONE}
        assert "could not be sent: OverflowError: too large a number" in found.error(1)
