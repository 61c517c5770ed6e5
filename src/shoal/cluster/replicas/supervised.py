"""The states of a supervised process, from its start to its end, and the rule for starting it again.

The rule holds for replicas of a fleet, replicas of a headless host and API servers. This module starts no processes and
reads no clock.
"""

from dataclasses import dataclass
from enum import StrEnum

from shoal.cluster.replicas.restart_budget import RestartBudget
from shoal.errors import ShoalError, UserError


class RunState(StrEnum):
    NEW = "new"  # it was not started yet
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"  # it has ended; the next start is due at `next_start`
    AWAITED = "awaited"  # another host starts it
    LEAVING = "leaving"  # it was taken out, and is not started again
    FAILED = "failed"  # it has ended, and is not started again


@dataclass(slots=True, kw_only=True)
class Supervised:
    """A process that is started again when it ends, for as long as that makes sense.

    The owner starts and watches the process, and reports here what has happened and when. After `ended` the state is
    RESTARTING, with the time of the next start; FAILED, with the reason; or AWAITED if another host starts it.
    """

    restarts: RestartBudget
    started_elsewhere: bool = False  # True: another host starts it
    useful_s: float  # a run that was ready for so many seconds was useful, even if it did no work
    state: RunState = RunState.NEW
    since: float = 0.0  # when this state began
    next_start: float = 0.0  # when it is started again, if it is RESTARTING
    starts: int = 0
    was_ready: bool = False  # True: at least one run became ready
    error: ShoalError | None = None  # why the last run ended
    why_not: str = ""  # the reason why it is not started again

    @property
    def num_restarts(self) -> int:
        return max(self.starts - 1, 0)

    @property
    def runs(self) -> bool:
        return self.state in (RunState.STARTING, RunState.READY)

    def is_due(self, now: float) -> bool:
        """Return whether the owner should start it now."""
        return self.state in (RunState.NEW, RunState.RESTARTING) and self.next_start <= now

    def was_useful(self, now: float, *, worked: bool) -> bool:
        """Return whether the present run has been useful. `worked`: it has done some work for a client."""
        return worked or (self.state is RunState.READY and now - self.since >= self.useful_s)

    def started(self, now: float) -> None:
        """Note that it is being started, whether that will succeed or not."""
        self._check(RunState.NEW, RunState.RESTARTING, RunState.AWAITED)
        self.starts += 1
        self._enter(RunState.STARTING, now)

    def became_ready(self, now: float) -> None:
        self._check(RunState.STARTING)
        self.was_ready = True
        self._enter(RunState.READY, now)

    def taken_out(self, now: float) -> None:
        """Note that it is not needed any more, in whatever state it is."""
        self._enter(RunState.LEAVING, now)

    def ended(self, error: ShoalError, now: float, *, useful: bool, ever_ready: bool | None = None) -> None:
        """Note that it has ended, or could not be started, and decide what follows.

        Args:
            error: why it has ended.
            useful: True if the run was useful.
            ever_ready: True if it has been ready in any run, or another process without which it cannot work; None: the
                former is what counts.
        """
        self._check(RunState.STARTING, RunState.READY)
        self.error = error
        if self.started_elsewhere:
            self._enter(RunState.AWAITED, now)
            return
        pause = None
        if isinstance(error, UserError):
            self.why_not = "a restart would not correct that"
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
        """The second half of a log line about what follows the last end, such as "is started again in 0.5 s"."""
        match self.state:
            case RunState.RESTARTING:
                pause = self.next_start - self.since
                return f"is started again in {pause:g} s" if pause else "is started again immediately"
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
