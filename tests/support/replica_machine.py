"""The rules that state machines of several replicas in lockstep have in common."""

from collections.abc import Sequence
from typing import Protocol

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from shoal.engine.core import EngineCore
from support.fakes import Outcomes


class DrivenReplicas(Protocol):
    """Replicas that a machine drives, in any order."""

    @property
    def cores(self) -> Sequence[EngineCore]: ...

    outcomes: Outcomes
    placed: dict[int, int]  # request -> its replica

    def step(self, replica: int) -> object: ...


class ReplicaMachine(RuleBasedStateMachine):
    """A machine whose `replicas` compute steps, and whose requests are aborted."""

    replicas: DrivenReplicas

    @rule(where=st.integers(0, 2), times=st.integers(1, 4))
    def step(self, where: int, times: int) -> None:
        for _ in range(times):
            self.replicas.step(where % len(self.replicas.cores))

    @precondition(lambda self: self.replicas.outcomes.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.replicas.outcomes.open))
        self.replicas.outcomes.may_abort.add(seq)
        self.replicas.cores[self.replicas.placed[seq]].abort([seq])
