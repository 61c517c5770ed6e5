"""What an engine is at: awake, paused or asleep. Every change from one to another is made here.

    awake <-- resume, wake_up --> paused      nothing is computed; what runs keeps its KV blocks
      |                             |
      +----------- sleep -----------+--> asleep   ... and weights and KV cache have been given back

Whoever is asleep is awake again when it has both parts back.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from shoal.errors import ConfigError

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
PARTS = (WEIGHTS, KV_CACHE)
_SCHEDULING = "scheduling"  # vLLM's name for what is neither: steps
LEVELS = (0, 1, 2)


class ActivityState(StrEnum):
    AWAKE = "awake"
    PAUSED = "paused"
    ASLEEP = "asleep"


@dataclass(frozen=True, slots=True)
class Activity:
    """`level` is that of the sleep; `missing` are the parts of the memory that were given back."""

    state: ActivityState = ActivityState.AWAKE
    level: int = 0
    missing: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """Are steps computed?"""
        return self.state is ActivityState.AWAKE

    def pause(self) -> "Activity":
        """Whoever is asleep computes nothing anyway, and stays asleep."""
        return PAUSED if self.state is ActivityState.AWAKE else self

    def resume(self) -> "Activity":
        """
        Raises:
            ConfigError: it is asleep.
        """
        if self.state is ActivityState.ASLEEP:
            raise ConfigError(
                f"the engine is asleep and has no {' and no '.join(self.missing)}: wake it up (POST /wake_up)"
            )
        return AWAKE

    def sleep(self, level: int) -> "Activity":
        """Level 0 is a pause. A sleep does not become lighter by another one.

        Raises:
            ConfigError: there is no such level.
        """
        if level not in LEVELS:
            raise ConfigError(f"the level of a sleep must be 0, 1 or 2, got {level}")
        if level == 0:
            return self.pause()
        return Activity(ActivityState.ASLEEP, max(level, self.level), PARTS)

    def wake_up(self, tags: Sequence[str] | None = None) -> "Activity":
        """`tags`: the parts to take again; None: all. With the last one it is awake, be it paused before.

        Raises:
            ConfigError: there is no such part.
        """
        wanted = PARTS if tags is None else tuple(tags)
        unknown = [tag for tag in wanted if tag not in (*PARTS, _SCHEDULING)]
        if unknown:
            raise ConfigError(f"tags may be {', '.join((*PARTS, _SCHEDULING))}; got {', '.join(unknown)[:80]}")
        missing = tuple(part for part in self.missing if part not in wanted)
        return replace(self, missing=missing) if missing else AWAKE

    def way(self, to: "Activity") -> "tuple[Activity, ...]":
        """The states that engines take one after the other on their way there.

        Those that compute together take each step before any takes the next. Nobody computes while another one has not
        come to rest or is not back.
        """
        through_pause = (self.runs and to.missing) or (to.runs and self.missing)
        return (PAUSED, to) if through_pause else (to,)


AWAKE = Activity()
PAUSED = Activity(ActivityState.PAUSED)
