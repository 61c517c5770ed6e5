"""What all replicas in lockstep obey: the replica that has come furthest decides which step and which reform is due."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from shoal.errors import RanksDied
from shoal.protocols import Lockstep
from shoal.wire.base import replace_fields
from shoal.wire.lockstep import LockstepState


class LockstepMember(Lockstep, Protocol):
    """A replica's end of a lockstep. A wait for channels can include it.

    It is readable when another replica has launched a step, begun or finished a reform, or failed.
    """

    backlog: bool

    def fileno(self) -> int: ...

    def clear(self) -> None:
        """Make this not readable until the next message of another replica."""

    def close(self, why: str = "") -> None:
        """Leave the lockstep. Idempotent.

        Args:
            why: the failure that the other replicas are told of; "" if the work is done.
        """


class SharedProgress(ABC):
    """The rules of `Lockstep`, which need nothing but the latest state of each replica.

    No replica leads. An incarnation is never made smaller, so replicas whose ranks die at the same time, or while they
    form their groups, agree on the largest incarnation that any of them has begun.
    """

    def __init__(self, incarnation: int) -> None:
        """Begin with an incarnation that is the same for all replicas."""
        self._own = LockstepState(incarnation)

    @abstractmethod
    def others(self) -> Mapping[int, LockstepState]:
        """Return the latest states of the other replicas, by number.

        Raises:
            EngineError: another replica has failed.
        """

    @abstractmethod
    def tell(self, state: LockstepState) -> None:
        """Tell the other replicas the state of this one, which replaces the one before."""

    @property
    def incarnation(self) -> int:
        return self._own.incarnation

    def launched(self, count: int) -> None:
        self._change_to(replace_fields(self._own, steps=count))

    def steps_due(self) -> int:
        states = (self._own, *self.others().values())
        return max(state.steps for state in states if state.incarnation == self.incarnation)

    def check(self) -> None:
        others = self.others()
        newest = max((state.incarnation for state in others.values()), default=self.incarnation)
        if newest > self.incarnation:
            causes = [
                f"replica {number}, which shares experts with this one: {state.why}"
                for number, state in sorted(others.items())
                if state.incarnation == newest and state.why
            ]
            raise RanksDied("; ".join(causes), ())

    def begin_reform(self, why: str, *, awake: bool) -> int:
        begun = [state.incarnation for state in self.others().values()]
        incarnation = max(self.incarnation + 1, *begun)
        self._change_to(LockstepState(incarnation, formed=False, awake=awake, why=why))
        return incarnation

    def formed(self) -> bool:
        if not self._own.formed:
            self._change_to(replace_fields(self._own, formed=True))
        return all(state.incarnation == self.incarnation and state.formed for state in self.others().values())

    @property
    def all_awake(self) -> bool:
        return self._own.awake and all(state.awake for state in self.others().values())

    def _change_to(self, state: LockstepState) -> None:
        self._own = state
        self.tell(state)


def progress(state: LockstepState) -> tuple[int, bool, int]:
    """Return how far a replica has come, in a form that can be compared."""
    return state.incarnation, state.formed, state.steps
