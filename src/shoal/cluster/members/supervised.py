"""One supervised process: started, ready, ended, and started again or given up. Without processes and clocks.

Replicas of a fleet, replicas of a headless host and API servers all follow this one rule.
"""

from dataclasses import dataclass
from enum import StrEnum

from shoal.cluster.members.restarts import Restarts
from shoal.errors import ShoalError, UserError


class RunState(StrEnum):
    NEW = "new"  # not started yet: a first start is due
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it has ended; the next start is due at `next_start`
    AWAITED = "awaited"  # another host starts it
    LEAVING = "leaving"  # it was taken out: its end is final
    FAILED = "failed"  # it has ended, and is not started again


@dataclass(slots=True, kw_only=True)
class Supervised:
    """A process that is started again when it ends, for as long as that makes sense.

    The owner starts and watches the process, and says here what has happened and when. The answer to `ended` is the new
    state: RESTARTING with the time of the next start, FAILED with the reason, or AWAITED where another host starts it.
    """

    restarts: Restarts
    elsewhere: bool = False  # another host starts it
    useful_s: float  # a run that was ready for so many seconds was useful, even without work
    state: RunState = RunState.NEW
    since: float = 0.0  # when it came into this state
    next_start: float = 0.0
    starts: int = 0
    was_ready: bool = False  # in any run
    error: ShoalError | None = None  # of the last end
    why_not: str = ""  # the reason why it is not started again

    @property
    def num_restarts(self) -> int:
        return max(self.starts - 1, 0)

    @property
    def runs(self) -> bool:
        return self.state in (RunState.STARTING, RunState.READY)

    def is_due(self, now: float) -> bool:
        """Return whether it is to be started now."""
        return self.state in (RunState.NEW, RunState.RESTARTING) and self.next_start <= now

    def was_useful(self, now: float, *, worked: bool) -> bool:
        """Return whether the present run has been useful so far. `worked`: it has done something for a client."""
        return worked or (self.state is RunState.READY and now - self.since >= self.useful_s)

    def started(self, now: float) -> None:
        """Note the begin of a start, whether it succeeds or not."""
        self._check(RunState.NEW, RunState.RESTARTING, RunState.AWAITED)
        self.starts += 1
        self._enter(RunState.STARTING, now)

    def became_ready(self, now: float) -> None:
        self._check(RunState.STARTING)
        self.was_ready = True
        self._enter(RunState.READY, now)

    def taken_out(self, now: float) -> None:
        """Note that it is not wanted any more, whatever it is at."""
        self._enter(RunState.LEAVING, now)

    def ended(self, error: ShoalError, now: float, *, useful: bool, ever_ready: bool | None = None) -> None:
        """Decide what follows an end, which may be that of a start. `useful`: the run was. `ever_ready`: it, or one
        without which it can't work, has been ready; by default, it itself."""
        self._check(RunState.STARTING, RunState.READY)
        self.error = error
        if self.elsewhere:
            self._enter(RunState.AWAITED, now)
            return
        pause = None
        if isinstance(error, UserError):
            self.why_not = "a restart would not mend that"
        elif not (self.was_ready if ever_ready is None else ever_ready):
            self.why_not = "it has never been ready"
        elif (pause := self.restarts.pause(now, useful=useful)) is None:
            self.why_not = self.restarts.why_not
        if pause is None:
            self._enter(RunState.FAILED, now)
            return
        self.next_start = now + pause
        self._enter(RunState.RESTARTING, now)

    @property
    def outlook(self) -> str:
        """A predicate that says what follows the last end, for log lines: "is started again in 0.5 s"."""
        match self.state:
            case RunState.RESTARTING:
                pause = self.next_start - self.since
                return f"is started again in {pause:g} s" if pause else "is started again at once"
            case RunState.FAILED:
                return f"is not started again: {self.why_not}"
            case RunState.AWAITED:
                return "is awaited"
            case _:
                return f"is {self.state}"

    def _enter(self, state: RunState, now: float) -> None:
        self.state = state
        self.since = now

    def _check(self, *allowed: RunState) -> None:
        assert self.state in allowed, f"{self.state}, not {' or '.join(allowed)}"
