"""The supervision of a fleet's replicas: restarts, lockstep, scaling, other hosts, silence."""

import pytest

from shoal.errors import CheckpointError, ConfigError, EngineError
from shoal.wire.base import replace_fields
from shoal.wire.engine import RefusalKind
from support.fake_replica import STATS
from support.fakes import request
from support.fleet_world import NEVER, FakeMember, Hanging, pinned, world

# --- restarts -----------------------------------------------------------------------------------------------------


def test_a_useful_replica_is_started_again_immediately() -> None:
    with world(1) as found:
        found.add(request(0, [1], 50))
        found.settle(5)
        found.kill(found.members[0])
        found.settle(3)
        assert len(found.members) == 2
        (state,) = found.fleet.status().replicas
        assert (state.restarts, state.cause) == (1, "replica 0 was killed by SIGKILL")
        assert found.fleet.status().replays == 1
        found.finish()


def test_a_useless_replica_waits_longer_each_time_and_is_given_up() -> None:
    with world(1) as found:
        pauses = []
        for run in range(1, 6):
            found.settle(3)
            assert len(found.members) == run
            found.kill(found.members[-1])
            found.settle(2)
            begun = found.clock.now
            while len(found.members) == run and found.clock.now - begun < 60:
                found.step(0.25)
            pauses.append(found.clock.now - begun)
        assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
        assert found.state(0) == "failed"
        assert "was killed by SIGKILL" in str(found.fleet.fatal)
        found.add(request(0, [1]))
        found.step()
        assert found.refusals() == {0: RefusalKind.LOST}
        with pytest.raises(EngineError, match="SIGKILL"):
            _ = found.fleet.started


def test_a_run_that_was_not_ready_is_useless_even_after_a_useful_one() -> None:
    with world(1) as found:
        found.add(request(0, [1], 500))
        found.settle(40)
        found.polls = lambda: NEVER
        found.kill(found.member(0))
        found.settle(2)
        for run in range(2, 6):
            assert len(found.members) == run
            found.kill(found.member(0))
            found.settle(2)
            assert len(found.members) == run, "it is not started again immediately"
            found.step(40)
        found.kill(found.member(0))
        found.settle(2)
        assert "replica 0 was killed" in found.error(0)


def test_restarts_within_an_hour_are_limited() -> None:
    with world(1, max_restarts=2) as found:
        for seq in range(3):
            found.add(request(seq, [1], 50))
            found.settle(60)
            found.add(request(100 + seq, [2], 50))
            found.settle(30)
            found.kill(found.member(0))
            found.settle(3)
        assert found.state(0) == "failed"
        assert len(found.members) == 3


def test_a_replica_that_was_never_ready_is_not_started_again() -> None:
    with world(1, polls=lambda: 5) as found:
        found.add(request(0, [1]))
        found.step()
        found.kill(found.members[0])
        found.settle(5, 100.0)
        assert len(found.members) == 1
        assert found.refusals() == {0: RefusalKind.LOST}


def test_if_a_replica_failed_by_a_mistake_of_the_user_the_error_says_so() -> None:
    with world(2, fails=lambda number, _: CheckpointError("no weights") if number else EngineError("lost")) as found:
        found.settle(2)
        with pytest.raises(CheckpointError, match="no replica is left: replica 0: lost; replica 1: no weights"):
            _ = found.fleet.started


def test_a_replica_that_cannot_be_started_does_not_affect_the_others() -> None:
    with world(2, fails=lambda number, _: None if number else OSError(11, "no processes")) as found:
        found.settle(2)
        assert found.fleet.fatal is None
        with pytest.raises(EngineError, match=r"replica 0 cannot be started: .*no processes"):
            _ = found.fleet.started
        found.add(request(0, [1]))
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE}


def test_a_replica_that_takes_too_long_to_start_is_killed() -> None:
    with world(2, polls=lambda: NEVER, start_timeout=10.0) as found:
        found.members[1].polls = 0
        found.settle(3, 5.0)
        assert found.members[0].closed
        assert [found.state(0), found.state(1)] == ["failed", "ready"]
        assert "was not ready within 10 s" in found.fleet.status().replicas[0].cause


def test_a_fleet_without_replicas_has_no_timers() -> None:
    """Otherwise the thread of the fleet would wake up again and again for nothing."""
    with world(2, in_lockstep=True) as found:
        found.settle(3)
        found.fails = lambda number, _: CheckpointError("gone") if number else None
        found.kill(found.member(0))
        for _ in range(5):
            found.settle(3, 30.0)
        assert found.fleet.fatal is not None
        found.kill(found.member(0))
        found.settle(3, 30.0)
        assert found.fleet.seconds_until_due() > 100


def test_counters_go_on_over_restarts() -> None:
    with world(1) as found:
        found.add(request(0, [1], 60))
        found.settle(30)
        found.members[0].snapshot = replace_fields(STATS, generated_tokens=30, running=1, iteration_tokens=(1, 2))
        assert found.fleet.status().replicas[0].stats == found.members[0].snapshot
        found.kill(found.members[0])
        found.settle(5)
        found.members[1].snapshot = replace_fields(STATS, generated_tokens=4, iteration_tokens=(0, 1, 1))
        (state,) = found.fleet.status().replicas
        assert state.stats is not None
        assert (state.stats.generated_tokens, state.stats.running) == (34, 0)
        assert state.stats.iteration_tokens == (1, 3, 1)


# --- lockstep -----------------------------------------------------------------------------------------------------


def test_replicas_in_lockstep_start_again_together() -> None:
    with world(3, in_lockstep=True) as found:
        for seq in range(6):
            found.add(request(seq, [seq], 60))
        found.settle(30)
        found.kill(found.members[1])
        found.settle(3)
        assert [member.generation for member in found.members] == [0, 0, 0, 1, 1, 1]
        assert all(member.closed for member in found.members[:3])
        found.finish()
        assert not any(found.refusals().values())


def test_in_lockstep_a_replica_that_ends_while_starting_ends_the_others() -> None:
    with world(2, in_lockstep=True) as found:
        found.add(request(0, [1], 100))
        found.settle(40)
        found.polls = lambda: 4
        found.kill(found.member(0))
        found.settle(2)
        found.kill(found.member(1))
        found.settle(3)
        assert [member.generation for member in found.members[:4]] == [0, 0, 1, 1]
        assert found.members[2].closed
        found.finish()
        assert found.member(0).generation == found.member(1).generation == 2


# --- changes of the number of replicas -----------------------------------------------------------------------------


def test_replicas_are_added_and_taken_out_under_load() -> None:
    with world(2, polls=lambda: 2, most=2) as found:
        for seq in range(30):
            found.add(request(seq, [seq % 5], 20))
        for count in (4, 1, 3, 2):
            found.settle(8)
            found.fleet.scale(count)
        found.finish()
        found.settle(20)
        assert not any(found.refusals().values())
        assert [each.state for each in found.fleet.status().replicas] == ["ready"] * 2


def test_a_leaving_replica_does_not_block_the_fleet_and_is_killed_in_the_end() -> None:
    with world(2) as found:
        found.settle(2)
        leaving = found.member(1)
        leaving.polls = NEVER
        found.fleet.scale(1)
        found.settle(3, 1.0)
        assert found.state(1) == "leaving"
        assert leaving.leaving
        assert not leaving.closed
        found.fleet.scale(2)
        found.settle(3)
        assert found.state(2) == "ready", "the number 1 is still in use"
        found.settle(3, 5.0)
        assert leaving.closed
        assert found.state(1) == ""


def test_the_number_of_replicas_in_lockstep_cannot_be_changed() -> None:
    with world(2, in_lockstep=True) as found:
        found.fleet.scale(2)
        with pytest.raises(ConfigError, match="their number cannot be changed"):
            found.fleet.scale(3)
        with pytest.raises(ConfigError, match="at least one"):
            found.fleet.scale(0)


def test_new_replicas_replace_failed_ones() -> None:
    with world(2, max_restarts=0) as found:
        found.settle(2)
        found.kill(found.member(1))
        found.settle(3)
        assert found.state(1) == "failed"
        found.fleet.scale(2)
        found.settle(3)
        assert [found.state(0), found.state(1)] == ["ready", "ready"]
        assert found.fleet.status().replicas[1].restarts == 0


def test_added_replicas_take_no_number_of_another_host() -> None:
    with world(1, served_elsewhere=[1, 2]) as found:
        found.settle(2)
        found.fleet.scale(3)
        found.settle(2)
        assert [found.state(number) for number in (0, 3, 4)] == ["ready"] * 3
        found.fleet.scale(1)
        found.settle(3)
        found.fleet.scale(2)
        found.settle(2)
        assert [each.number for each in found.fleet.status().replicas if each.state == "ready"] == [0, 3]


# --- replicas of other hosts ----------------------------------------------------------------------------------------


def test_replicas_of_other_hosts_are_awaited_after_each_end() -> None:
    with world(0, awaited=[0, 1]) as found:
        found.add(request(0, [1], 60))
        found.settle(3)
        assert [found.state(0), found.state(1)] == ["awaited", "awaited"]
        assert not found.fleet.started
        for run in range(3):
            member = FakeMember(1, run, polls=2)
            found.members.append(member)
            found.fleet.arrive(1, member)
            found.settle(30)
            assert found.fleet.started
            assert (found.fleet.status().replicas[1].host, found.fleet.status().replicas[1].pid) == ("elsewhere", 4711)
            if run < 2:
                found.kill(member)
                found.settle(3)
                assert found.state(1) == "awaited"
        found.finish()
        assert found.refusals() == {0: RefusalKind.NONE}


def test_tokens_of_an_earlier_run_on_another_host_do_not_make_a_run_useful() -> None:
    """Replicas in lockstep end together. They start again without a pause only if one has drawn a token in this run."""
    with world(1, awaited=[1], in_lockstep=True) as found:
        pauses: list[float] = []
        for run in range(3):
            member = FakeMember(1, run)
            found.members.append(member)
            found.fleet.arrive(1, member)
            found.settle(4)
            if run == 0:
                found.add(pinned(0, 1, 5))
                found.finish()
            found.kill(member)
            found.kill(found.member(0))
            found.settle(1)
            pauses.append(found.fleet.seconds_until_due())
            found.settle(3, 1.0)
        assert pauses[0] == 0
        assert pauses[2] > 0


def test_a_replica_that_is_not_awaited_is_dismissed() -> None:
    with world(1, awaited=[1]) as found:
        found.settle(2)
        strangers = [FakeMember(7), FakeMember(0)]
        found.members += strangers
        for stranger in strangers:
            found.fleet.arrive(stranger.number, stranger)
        found.settle(3, 3.0)
        assert all(stranger.closed for stranger in strangers)
        assert not found.members[0].closed


def test_a_replica_that_reconnects_is_counted_once() -> None:
    with world(0, awaited=[0]) as found:
        for generated, pid in [(10, 1), (25, 1), (30, 1), (5, 2), (8, 2)]:
            member = FakeMember(0)
            member.pid = pid
            found.members.append(member)
            found.fleet.arrive(0, member)
            found.settle(3)
            member.snapshot = replace_fields(STATS, generated_tokens=generated)
            stats = found.fleet.status().replicas[0].stats
            assert stats is not None
            assert stats.generated_tokens == (generated if pid == 1 else 30 + generated)
            found.kill(member)
            found.settle(3)


# --- silence ---------------------------------------------------------------------------------------------------------


def test_a_silent_replica_with_requests_is_killed() -> None:
    with world(1, answer_timeout=10.0) as found:
        found.settle(2)
        found.members[0].__class__ = Hanging
        found.settle(40, 1.0)
        assert found.state(0) == "ready", "a replica without requests may be silent"
        found.add(request(0, [1]))
        found.settle(9, 1.0)
        assert len(found.members) == 1
        found.finish()
        assert len(found.members) == 2
        assert found.members[0].closed
        assert "replica 0 has 1 requests and has sent nothing for" in found.fleet.status().replicas[0].cause
        assert found.refusals() == {0: RefusalKind.NONE}


def test_time_in_which_the_fleet_itself_was_stopped_does_not_count_as_silence() -> None:
    with world(1, answer_timeout=10.0) as found:
        found.settle(2)
        found.members[0].__class__ = Hanging
        found.add(request(0, [1]))
        found.settle(2, 1.0)
        found.step(100_000.0)
        found.members[0].__class__ = FakeMember
        found.finish()
        assert len(found.members) == 1


# --- useful runs and counters -----------------------------------------------------------------------------------


def test_a_replica_that_was_ready_for_long_was_useful() -> None:
    with world(1) as found:
        for run in range(1, 9):
            found.settle(3)
            assert len(found.members) == run
            found.step(100_000.0)
            found.kill(found.members[-1])
            found.settle(3)
            assert len(found.members) == run + 1, "it is started again immediately"


def test_counters_go_on_when_a_number_is_used_again() -> None:
    with world(2) as found:
        found.settle(2)
        for count, generated in enumerate([7, 11, 13]):
            found.member(1).snapshot = replace_fields(STATS, generated_tokens=generated)
            stats = found.fleet.status().replicas[1].stats
            assert stats is not None
            assert stats.generated_tokens == [7, 18, 31][count]
            found.fleet.scale(1)
            found.settle(5, 5.0)
            assert found.state(1) == ""
            found.fleet.scale(2)
            found.settle(5)
