"""Awake, paused, asleep: every way from one to another."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.activity import AWAKE, PARTS, PAUSED, Activity, ActivityState
from shoal.errors import ConfigError

ASLEEP = Activity(ActivityState.ASLEEP, 1, PARTS)
DEEPER = Activity(ActivityState.ASLEEP, 2, PARTS)
NO_CACHE = Activity(ActivityState.ASLEEP, 1, ("kv_cache",))
NO_WEIGHTS = Activity(ActivityState.ASLEEP, 2, ("weights",))
ALL = (AWAKE, PAUSED, ASLEEP, DEEPER, NO_CACHE, NO_WEIGHTS)

Change = Callable[[Activity], Activity]
CHANGES: dict[str, Change] = {
    "pause": lambda now: now.pause(),
    "resume": lambda now: now.resume(),
    "sleep 0": lambda now: now.sleep(0),
    "sleep 1": lambda now: now.sleep(1),
    "sleep 2": lambda now: now.sleep(2),
    "wake_up": lambda now: now.wake_up(),
    "wake_up weights": lambda now: now.wake_up(["weights"]),
    "wake_up kv_cache": lambda now: now.wake_up(["kv_cache"]),
    "wake_up scheduling": lambda now: now.wake_up(["scheduling"]),
}

#          from        change                to
TABLE = [
    (AWAKE, "pause", PAUSED),
    (AWAKE, "resume", AWAKE),
    (AWAKE, "sleep 0", PAUSED),
    (AWAKE, "sleep 1", ASLEEP),
    (AWAKE, "sleep 2", DEEPER),
    (AWAKE, "wake_up", AWAKE),
    (PAUSED, "pause", PAUSED),
    (PAUSED, "resume", AWAKE),
    (PAUSED, "sleep 1", ASLEEP),
    (PAUSED, "wake_up", AWAKE),
    (PAUSED, "wake_up scheduling", AWAKE),
    (ASLEEP, "pause", ASLEEP),
    (ASLEEP, "resume", None),
    (ASLEEP, "sleep 0", ASLEEP),
    (ASLEEP, "sleep 2", DEEPER),
    (DEEPER, "sleep 1", DEEPER),
    (ASLEEP, "wake_up", AWAKE),
    (ASLEEP, "wake_up weights", NO_CACHE),
    (ASLEEP, "wake_up scheduling", ASLEEP),
    (DEEPER, "wake_up kv_cache", NO_WEIGHTS),
    (NO_CACHE, "wake_up weights", NO_CACHE),
    (NO_CACHE, "wake_up kv_cache", AWAKE),
    (NO_WEIGHTS, "wake_up weights", AWAKE),
    (NO_CACHE, "resume", None),
    (NO_CACHE, "sleep 1", ASLEEP),
]


@pytest.mark.parametrize(("before", "change", "after"), TABLE)
def test_each_change_leads_where_the_table_says(before: Activity, change: str, after: Activity | None) -> None:
    if after is None:
        with pytest.raises(ConfigError, match="asleep"):
            CHANGES[change](before)
    else:
        assert CHANGES[change](before) == after


@given(st.lists(st.sampled_from(list(CHANGES))))
def test_whatever_happens_it_is_asleep_exactly_while_something_is_missing(names: list[str]) -> None:
    now = AWAKE
    for name in names:
        try:
            now = CHANGES[name](now)
        except ConfigError:
            assert name == "resume"
        assert (now.state is ActivityState.ASLEEP) == bool(now.missing) == (now.level > 0)
        assert now.runs == (now.state is ActivityState.AWAKE)
        if name != "resume":
            assert CHANGES[name](now) == now, "the same again changes nothing"


@pytest.mark.parametrize("before", ALL)
@pytest.mark.parametrize("after", ALL)
def test_no_engine_runs_one_step_before_or_after_another_lacks_memory(before: Activity, after: Activity) -> None:
    steps = before.steps_to(after)
    assert steps[-1] == after
    for one, next_ in zip((before, *steps), steps, strict=False):
        assert not (one.runs and next_.missing), "all come to rest first"
        assert not (one.missing and next_.runs), "all have their memory first"


@pytest.mark.parametrize("level", [-1, 3])
def test_other_levels_are_refused(level: int) -> None:
    with pytest.raises(ConfigError, match=f"0, 1 or 2, got {level}"):
        AWAKE.sleep(level)


def test_other_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights, kv_cache, scheduling; got activations"):
        ASLEEP.wake_up(["weights", "activations"])
