"""Pauses, sleeps and cache resets of all replicas of a fleet, which is driven by hand."""

from typing import Any

import pytest

from shoal.activity import AWAKE, PARTS, PAUSED, Activity, ActivityState
from shoal.errors import ConfigError, UserError
from shoal.wire.base import replace_fields
from shoal.wire.engine import (
    EngineRequest,
    RefusalKind,
    ResetOutcome,
    ResetPrefixCache,
    SetActivity,
    reset_outcome_decoder,
)
from shoal.wire.fleet import Operation
from support.fake_replica import STATS
from support.fakes import alone, request
from support.fleet_world import FakeMember, FleetWorld, Hanging, world

ASLEEP = Activity(ActivityState.ASLEEP, 1, PARTS)


def operate(found: FleetWorld, verb: str, **options: Any) -> list[Any]:
    """Begin an operation. Return a list that gets its outcome when it has ended."""
    outcomes: list[Any] = []
    found.fleet.operate(Operation(verb, **options), outcomes.append)
    return outcomes


def activities(member: FakeMember) -> list[Activity]:
    return [order.activity for order in member.orders if isinstance(order, SetActivity)]


def running(found: FleetWorld, count: int = 4, length: int = 12) -> list[EngineRequest]:
    """Add requests, and return them when replicas have begun to draw."""
    specs = [request(seq, [seq, 1], length) for seq in range(count)]
    found.settle(2)
    for spec in specs:
        found.add(spec)
    found.settle(3)
    return specs


def test_during_a_pause_requests_are_kept_and_new_ones_wait() -> None:
    with world(2, most=2) as found:
        running(found)
        outcomes = operate(found, "pause", mode="keep")
        found.settle(2)
        assert outcomes == [b""]
        given = {seq: len(tokens) for seq, tokens in found.outcomes.tokens.items()}
        new = request(9, [9], 3)
        found.add(new)
        found.settle(20, 1.0)
        assert {seq: len(tokens) for seq, tokens in found.outcomes.tokens.items()} == {**given, 9: 0}
        status = found.fleet.status()
        assert (status.activity, status.queued, status.accepting) == ("paused", 1, True)
        assert operate(found, "resume") == []
        found.finish()
        assert all(found.outcomes.tokens[seq] == alone(spec) for seq, spec in found.outcomes.specs.items())
        assert found.fleet.status().activity == "awake"


def test_queue_limits_and_deadlines_hold_during_a_pause() -> None:
    with world(1, max_queued=1, max_wait=10.0, timeout=30.0) as found:
        running(found, 1)
        operate(found, "pause", mode="keep")
        found.settle(2)
        found.add(request(5, [5]))
        found.add(request(6, [6]))
        found.step()
        assert found.refusals() == {6: RefusalKind.FULL}
        found.settle(12, 1.0)
        assert found.refusals()[5] is RefusalKind.LATE
        found.settle(20, 1.0)
        assert found.refusals()[0] is RefusalKind.LATE
        operate(found, "resume")
        found.finish()


def test_a_pause_may_abort_all_requests() -> None:
    with world(1, most=2) as found:
        specs = running(found)
        found.outcomes.may_abort.update(spec.seq for spec in specs)
        outcomes = operate(found, "pause", mode="abort")
        found.settle(3)
        assert len(outcomes) == 1
        assert not found.outcomes.open
        assert set(found.refusals().values()) == {RefusalKind.NONE}
        assert [type(order) for order in found.members[0].orders] == [SetActivity, ResetPrefixCache]


def test_a_pause_may_wait_until_replicas_have_finished_their_requests() -> None:
    with world(1, most=2) as found:
        running(found, 3, length=6)
        outcomes = operate(found, "pause", mode="wait")
        found.step()
        assert outcomes == []
        assert found.members[0].orders == [], "replicas compute until the requests have ended"
        found.settle(20)
        assert len(outcomes) == 1
        assert found.outcomes.open == [2], "no replica had begun with it"
        operate(found, "resume")
        found.finish()


def test_a_pause_that_waits_is_cancelled_by_the_next_operation() -> None:
    with world(1) as found:
        running(found, 1, length=50)
        outcomes = operate(found, "pause", mode="wait")
        assert found.fleet.status().activity == "paused"
        resumed = operate(found, "resume")
        found.settle(2)
        assert isinstance(outcomes[0], ConfigError)
        assert "pause: cancelled by resume before all requests had ended" in str(outcomes[0])
        assert resumed == [b""]
        found.finish()


def test_a_fleet_that_is_asleep_refuses_requests_until_all_its_memory_is_back() -> None:
    with world(2) as found:
        specs = running(found)
        slept = operate(found, "sleep", mode="keep", level=2)
        found.settle(3)
        assert slept == [b""]
        assert activities(found.members[0]) == [PAUSED, Activity(ActivityState.ASLEEP, 2, PARTS)]
        status = found.fleet.status()
        assert (status.activity, status.sleep_level, status.missing) == ("asleep", 2, PARTS)
        found.add(request(7, [7]))
        found.step()
        assert found.refusals() == {7: RefusalKind.ASLEEP}
        assert "POST /wake_up" in found.error(7)
        operate(found, "wake_up", tags=("weights",))
        found.settle(2)
        assert found.fleet.status().missing == ("kv_cache",)
        resumed = operate(found, "resume")
        assert isinstance(resumed[0], ConfigError)
        operate(found, "wake_up", tags=("kv_cache",))
        found.finish()
        assert all(found.outcomes.tokens[spec.seq] == alone(spec) for spec in specs)
        assert [member.activity for member in found.members] == [AWAKE, AWAKE]


def test_no_replica_runs_before_all_have_their_memory() -> None:
    with world(2, in_lockstep=True) as found:
        found.settle(2)
        operate(found, "sleep")
        found.settle(4)
        found.members[1].silent = True
        operate(found, "wake_up")
        found.settle(3)
        assert found.members[0].activity == PAUSED
        assert found.fleet.status().activity == "asleep"


def test_if_a_replica_cannot_wake_up_all_are_asleep_again() -> None:
    with world(2) as found:
        found.settle(2)
        operate(found, "sleep")
        found.settle(4)
        found.members[1].refuses = "model.safetensors is gone"
        outcomes = operate(found, "wake_up")
        found.settle(4)
        assert isinstance(outcomes[0], UserError)
        assert str(outcomes[0]) == "model.safetensors is gone"
        assert [member.activity for member in found.members] == [ASLEEP, ASLEEP]
        assert found.fleet.status().activity == "asleep"
        found.members[1].refuses = ""
        assert not isinstance(next(iter(operate(found, "wake_up")), None), Exception)
        found.settle(4)
        assert found.fleet.status().activity == "awake"


def test_a_replica_that_is_restarted_during_a_sleep_is_put_to_sleep() -> None:
    with world(2) as found:
        found.settle(2)
        operate(found, "sleep")
        found.settle(4)
        found.kill(found.members[0])
        found.settle(10, 1.0)
        assert found.state(0) == "ready"
        assert activities(found.member(0)) == [ASLEEP]
        operate(found, "wake_up")
        found.settle(3)
        spec = request(1, [1], 3)
        found.add(spec)
        found.finish()
        assert [member.activity for member in found.alive] == [AWAKE, AWAKE]


def test_an_operation_does_not_wait_for_a_dead_replica() -> None:
    with world(2) as found:
        found.settle(2)
        found.members[0].silent = True
        outcomes = operate(found, "pause")
        found.settle(3)
        assert outcomes == []
        found.kill(found.members[0])
        found.settle(3)
        assert len(outcomes) == 1


def test_a_replica_that_arrives_asleep_is_woken_up_before_it_gets_requests() -> None:
    with world(0, awaited=[0]) as found:
        member = FakeMember(0)
        member.activity = ASLEEP
        member.ready = lambda timeout: replace_fields(STATS, activity=ASLEEP)  # type: ignore[method-assign]
        found.members.append(member)
        found.fleet.arrive(0, member)
        found.add(request(1, [1], 3))
        found.finish()
        assert activities(member) == [AWAKE]


def test_a_paused_replica_may_be_silent() -> None:
    with world(1, answer_timeout=10.0) as found:
        running(found, 1)
        operate(found, "pause", mode="keep")
        found.settle(2)
        found.members[0].__class__ = Hanging
        found.settle(40, 1.0)
        assert len(found.members) == 1
        found.members[0].__class__ = FakeMember
        operate(found, "resume")
        found.finish()
        assert len(found.members) == 1


def test_a_reset_returns_the_sums_over_all_replicas() -> None:
    with world(2) as found:
        found.settle(2)
        outcomes = operate(found, "reset_prefix_cache", running=True)
        found.settle(2)
        assert reset_outcome_decoder.decode(outcomes[0]) == ResetOutcome(forgotten=6, held=0)
        assert [member.orders[0].running for member in found.members] == [True, True]  # type: ignore[union-attr]
        assert found.fleet.status().activity == "awake"


def test_replicas_in_lockstep_with_other_addresses_cannot_sleep() -> None:
    with world(1, served_elsewhere=[1], in_lockstep=True) as found:
        found.settle(2)
        with pytest.raises(ConfigError, match="replicas at other addresses"):
            operate(found, "sleep")
        outcomes = operate(found, "pause")
        found.settle(2)
        assert len(outcomes) == 1


@pytest.mark.parametrize(
    ("verb", "options", "why"),
    [
        ("pause", {"mode": "later"}, "mode must be one of abort, wait, keep"),
        ("sleep", {"level": 3}, "must be 0, 1 or 2"),
        ("wake_up", {"tags": ("lungs",)}, "tags may be weights, kv_cache, scheduling; got lungs"),
        ("dance", {}, "there is no operation 'dance'"),
    ],
)
def test_an_impossible_operation_is_refused(verb: str, options: dict[str, Any], why: str) -> None:
    with world(1) as found:
        found.settle(2)
        outcomes = operate(found, verb, **options)
        assert why in str(outcomes[0])
        assert isinstance(outcomes[0], ConfigError)
