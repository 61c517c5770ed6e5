"""Pauses, sleep and resets of caches, for all replicas of a fleet that is driven by hand."""

from typing import Any

import pytest

from cluster.test_fleet import FakeMember, Hanging, World, world
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

ASLEEP = Activity(ActivityState.ASLEEP, 1, PARTS)


def operate(found: World, verb: str, **options: Any) -> list[Any]:
    """What is told when it has ended."""
    told: list[Any] = []
    found.fleet.operate(Operation(verb, **options), told.append)
    return told


def activities(member: FakeMember) -> list[Activity]:
    return [message.activity for message in member.told if isinstance(message, SetActivity)]


def running(found: World, count: int = 4, length: int = 12) -> list[EngineRequest]:
    """Requests that replicas have begun with."""
    specs = [request(seq, [seq, 1], length) for seq in range(count)]
    found.settle(2)
    for spec in specs:
        found.add(spec)
    found.settle(3)
    return specs


def test_a_pause_keeps_requests_and_lets_new_ones_wait() -> None:
    with world(2, most=2) as found:
        running(found)
        told = operate(found, "pause", mode="keep")
        found.settle(2)
        assert told == [b""]
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


def test_limits_of_the_queue_and_deadlines_go_on_during_a_pause() -> None:
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


def test_a_pause_may_abort_what_runs_and_what_waits() -> None:
    with world(1, most=2) as found:
        specs = running(found)
        found.outcomes.may_abort.update(spec.seq for spec in specs)
        told = operate(found, "pause", mode="abort")
        found.settle(3)
        assert len(told) == 1
        assert not found.outcomes.open
        assert set(found.refusals().values()) == {RefusalKind.NONE}
        assert [type(message) for message in found.members[0].told] == [SetActivity, ResetPrefixCache]


def test_a_pause_may_wait_for_what_replicas_have() -> None:
    with world(1, most=2) as found:
        running(found, 3, length=6)
        told = operate(found, "pause", mode="wait")
        found.step()
        assert told == []
        assert found.members[0].told == [], "it computes until the requests have ended"
        found.settle(20)
        assert len(told) == 1
        assert found.outcomes.open == [2], "nobody had begun with it"
        operate(found, "resume")
        found.finish()


def test_a_pause_that_waits_is_called_off_by_what_comes_next() -> None:
    with world(1) as found:
        running(found, 1, length=50)
        told = operate(found, "pause", mode="wait")
        assert found.fleet.status().activity == "paused"
        resumed = operate(found, "resume")
        found.settle(2)
        assert isinstance(told[0], ConfigError)
        assert "pause: called off by resume" in str(told[0])
        assert resumed == [b""]
        found.finish()


def test_who_is_asleep_takes_no_requests_and_is_awake_with_the_last_part() -> None:
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


def test_none_runs_before_all_have_their_memory() -> None:
    with world(2, together=True) as found:
        found.settle(2)
        operate(found, "sleep")
        found.settle(4)
        found.members[1].silent = True
        operate(found, "wake_up")
        found.settle(3)
        assert found.members[0].activity == PAUSED
        assert found.fleet.status().activity == "asleep"


def test_if_one_can_not_wake_up_all_are_asleep_again() -> None:
    with world(2) as found:
        found.settle(2)
        operate(found, "sleep")
        found.settle(4)
        found.members[1].refuses = "model.safetensors is gone"
        told = operate(found, "wake_up")
        found.settle(4)
        assert isinstance(told[0], UserError)
        assert str(told[0]) == "model.safetensors is gone"
        assert [member.activity for member in found.members] == [ASLEEP, ASLEEP]
        assert found.fleet.status().activity == "asleep"
        found.members[1].refuses = ""
        assert not isinstance(next(iter(operate(found, "wake_up")), None), Exception)
        found.settle(4)
        assert found.fleet.status().activity == "awake"


def test_one_that_dies_asleep_comes_back_and_is_put_to_sleep() -> None:
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


def test_nobody_waits_for_one_that_dies_on_the_way() -> None:
    with world(2) as found:
        found.settle(2)
        found.members[0].silent = True
        told = operate(found, "pause")
        found.settle(3)
        assert told == []
        found.kill(found.members[0])
        found.settle(3)
        assert len(told) == 1


def test_one_that_arrives_asleep_is_woken_up_before_it_is_given_anything() -> None:
    with world(0, awaited=[0]) as found:
        member = FakeMember(0)
        member.activity = ASLEEP
        member.ready = lambda timeout: replace_fields(STATS, activity=ASLEEP)  # type: ignore[method-assign]
        found.members.append(member)
        found.fleet.arrive(0, member)
        found.add(request(1, [1], 3))
        found.finish()
        assert activities(member) == [AWAKE]


def test_one_that_is_paused_has_nothing_to_say_and_is_not_taken_for_lost() -> None:
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


def test_a_reset_says_what_all_replicas_have_forgotten() -> None:
    with world(2) as found:
        found.settle(2)
        told = operate(found, "reset_prefix_cache", running=True)
        found.settle(2)
        assert reset_outcome_decoder.decode(told[0]) == ResetOutcome(forgotten=6, held=0)
        assert [member.told[0].running for member in found.members] == [True, True]  # type: ignore[union-attr]
        assert found.fleet.status().activity == "awake"


def test_replicas_that_others_compute_with_can_not_sleep() -> None:
    with world(1, elsewhere=[1], together=True) as found:
        found.settle(2)
        with pytest.raises(ConfigError, match="replicas at other addresses"):
            operate(found, "sleep")
        told = operate(found, "pause")
        found.settle(2)
        assert len(told) == 1


@pytest.mark.parametrize(
    ("verb", "options", "why"),
    [
        ("pause", {"mode": "later"}, "mode must be one of abort, wait, keep"),
        ("sleep", {"level": 3}, "must be 0, 1 or 2"),
        ("wake_up", {"tags": ("lungs",)}, "tags may be weights, kv_cache, scheduling; got lungs"),
        ("dance", {}, "there is no operation 'dance'"),
    ],
)
def test_what_can_not_be_is_refused(verb: str, options: dict[str, Any], why: str) -> None:
    with world(1) as found:
        found.settle(2)
        told = operate(found, verb, **options)
        assert why in str(told[0])
        assert isinstance(told[0], ConfigError)
