"""The seams of the engine, without implementations."""

from collections.abc import Sequence
from typing import Protocol

from shoal.activity import Activity
from shoal.wire.base import Ids
from shoal.wire.engine import EngineRequest, EngineStats, ResetOutcome, SeqUpdate
from shoal.wire.grammars import GrammarAsk, Verdict
from shoal.wire.ranks import StepMask, StepPlan, StepResult


class Executor(Protocol):
    """Starts ranks and carries messages. A fake is a few lines; see tests/support/fakes.py."""

    num_blocks: int  # KV blocks that every rank holds, agreed on at start
    start_times: dict[str, float]  # seconds a start phase took

    def launch(self, plan: StepPlan) -> None:
        """Hands a plan to every rank, in the order of the calls. Never blocks.

        Raises:
            EngineError: a rank has failed.
        """

    def mask(self, mask: StepMask) -> None:
        """Hands out the mask of the plan that was launched last. Never blocks.

        Raises:
            EngineError: a rank has failed.
        """

    def poll(self, timeout: float) -> list[StepResult]:
        """Results that have arrived, waiting up to `timeout` seconds for the first; [] when there was none.

        Raises:
            EngineError: a rank died, stood still or reported an error.
        """

    def call(self, verb: str, payload: bytes = b"", *, timeout: float) -> list[bytes]:
        """Has every rank do `verb` after all plans launched so far. One answer a rank, by rank."""

    def close(self) -> None:
        """Ends every rank. Idempotent, never raises."""


class Grammars(Protocol):
    """Follows outputs that must obey a grammar. Nothing blocks but `poll`."""

    words: int  # 32-bit words in a row of a mask

    def follow(self, seq: int, grammar: str, output: Ids = ()) -> None:
        """Begins to follow an output, whose tokens so far are given. A Verdict comes in any case."""

    def ask(self, asks: Sequence[GrammarAsk]) -> None:
        """Tells of new tokens. A Verdict comes for each output that is followed."""

    def forget(self, seqs: Sequence[int]) -> None:
        """Idempotent in every state."""

    @property
    def pending(self) -> bool:
        """Is a Verdict on its way?"""

    def poll(self, timeout: float) -> list[Verdict]:
        """The verdicts that have come, waiting up to `timeout` seconds for the first."""

    def close(self) -> None: ...


class EngineClient(Protocol):
    """One engine, in this process or in another."""

    def add(self, request: EngineRequest) -> None:
        """Takes a request over. Every request ends in an update with `finish` set, or the engine fails."""

    def abort(self, seqs: Sequence[int]) -> None:
        """Idempotent in every state, unknown sequences included."""

    def updates(self, timeout: float) -> list[SeqUpdate]:
        """What has happened, waiting up to `timeout` seconds.

        Raises:
            EngineError: the engine failed; nothing more will come.
        """

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Engine(EngineClient, Protocol):
    """A client that may also say what the engine is at."""

    def become(self, activity: Activity) -> None:
        """Pauses, goes on, gives memory back or takes it again, and waits until that is done.

        Raises:
            UserError: it can't; it is as before.
            EngineError: the engine failed.
        """

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        """No block is found by its prefix any more. `running`: requests that run compute theirs again, too."""


class Recorder(Protocol):
    """Is told of every request's way, for metrics. Calls come from one thread."""

    def added(self, request: EngineRequest) -> None:
        """`request.arrival` is when it came."""

    def dealt(self, seq: int, replica: int) -> None:
        """A replica has it now; after a failure another one, or the same again."""

    def updated(self, replica: int, update: SeqUpdate) -> None:
        """What its client is given; with `finish` it is the last."""

    def stopped(self, seq: int) -> None:
        """Its output has reached a stop text. What still comes is its end, as that of an aborted one."""

    def ended(self, update: SeqUpdate) -> None:
        """It has ended without a replica's doing: refused, aborted, given up."""


class Lockstep(Protocol):
    """A replica's end of a lockstep: replicas whose ranks exchange tensors within a step all launch the same steps.

    Each replica launches as many steps as the replica that has launched most, if need be without work of its own. A
    replica with work launches further steps. So when no replica has work, all rest after the same number of steps.
    """

    def launched(self, count: int) -> None:
        """Tell the other replicas that this one has launched `count` steps so far."""

    def steps_due(self) -> int:
        """Return how many steps this replica must have launched: the most that any replica has. Never blocks.

        Raises:
            EngineError: another replica has failed; the message names it.
        """


class Policy(Protocol):
    """The order of requests: the one with the lowest key is served first, the one with the highest is preempted."""

    def sort_key(self, request: EngineRequest, arrival: int) -> tuple[int, ...]: ...
