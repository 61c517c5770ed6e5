"""The activity of an engine: awake, paused or asleep. All transitions between these states are here.

    awake <-- resume, wake_up --> paused      computes nothing; running requests keep their KV blocks
      |                             |
      +----------- sleep -----------+--> asleep   computes nothing, and has freed weights and KV cache

An engine that is asleep is awake again when it has both weights and KV cache back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from shoal.errors import ConfigError

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
PARTS = (WEIGHTS, KV_CACHE)
_SCHEDULING = "scheduling"  # another tag of vLLM, for the steps
LEVELS = (0, 1, 2)


class ActivityState(StrEnum):
    AWAKE = "awake"
    PAUSED = "paused"
    ASLEEP = "asleep"


@dataclass(frozen=True, slots=True)
class Activity:
    """The state of an engine, the level of its sleep, and the parts of memory that it has freed."""

    state: ActivityState = ActivityState.AWAKE
    level: int = 0
    missing: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """True if the engine computes steps."""
        return self.state is ActivityState.AWAKE

    def pause(self) -> "Activity":
        """Return the activity after a pause. An engine that is asleep stays asleep."""
        return PAUSED if self.state is ActivityState.AWAKE else self

    def resume(self) -> "Activity":
        """Return the activity after the end of a pause.

        Raises:
            ConfigError: the engine is asleep.
        """
        if self.state is ActivityState.ASLEEP:
            raise ConfigError(
                f"the engine is asleep and has no {' and no '.join(self.missing)}: wake it up (POST /wake_up)"
            )
        return AWAKE

    def sleep(self, level: int) -> "Activity":
        """Return the activity after falling asleep. Level 0 is a pause; a lower level does not change a deeper sleep.

        Raises:
            ConfigError: the level is not 0, 1 or 2.
        """
        if level not in LEVELS:
            raise ConfigError(f"the level of a sleep must be 0, 1 or 2, got {level}")
        if level == 0:
            return self.pause()
        return Activity(ActivityState.ASLEEP, max(level, self.level), PARTS)

    def wake_up(self, tags: Sequence[str] | None = None) -> "Activity":
        """Return the activity after waking up, which ends a pause too.

        tags: the parts of memory to allocate again, None for all. While parts are missing the engine stays asleep.

        Raises:
            ConfigError: a tag is unknown.
        """
        wanted = PARTS if tags is None else tuple(tags)
        unknown = [tag for tag in wanted if tag not in (*PARTS, _SCHEDULING)]
        if unknown:
            raise ConfigError(f"tags may be {', '.join((*PARTS, _SCHEDULING))}; got {', '.join(unknown)[:80]}")
        missing = tuple(part for part in self.missing if part not in wanted)
        return replace(self, missing=missing) if missing else AWAKE

    def steps_to(self, to: "Activity") -> "tuple[Activity, ...]":
        """Return the activities through which engines go to `to`, one after the other.

        Engines that compute in lockstep all take one before any of them takes the next. So no engine computes while
        another one has not paused yet, or is not awake yet.
        """
        through_pause = (self.runs and to.missing) or (to.runs and self.missing)
        return (PAUSED, to) if through_pause else (to,)


AWAKE = Activity()
PAUSED = Activity(ActivityState.PAUSED)
