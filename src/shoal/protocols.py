"""The interfaces around the engine, without implementations."""

from collections.abc import Sequence
from typing import Protocol

from shoal.activity import Activity
from shoal.wire.base import Ids
from shoal.wire.engine import EngineRequest, EngineStats, ResetOutcome, SeqUpdate
from shoal.wire.grammars import GrammarAsk, Verdict
from shoal.wire.ranks import StepMask, StepPlan, StepResult


class Executor(Protocol):
    """Starts the ranks, and carries messages between engine and ranks. tests/support/fakes.py has a short fake."""

    num_blocks: int  # the number of KV blocks of every rank, which the ranks agree on at the start
    start_times: dict[str, float]  # the seconds of each phase of the start

    def launch(self, plan: StepPlan) -> None:
        """Send a step plan to every rank, in the order of the calls. Never blocks.

        Raises:
            EngineError: a rank has failed.
        """

    def mask(self, mask: StepMask) -> None:
        """Send the mask of the step plan that was launched last. Never blocks.

        Raises:
            EngineError: a rank has failed.
        """

    def poll(self, timeout: float) -> list[StepResult]:
        """Return the results that have arrived, after a wait of up to `timeout` seconds for the first.

        Raises:
            EngineError: a rank has died, hangs or has reported an error.
        """

    def call(self, verb: str, payload: bytes = b"", *, timeout: float) -> list[bytes]:
        """Have every rank execute `verb` after all step plans launched so far. Return the answers by rank."""

    def close(self) -> None:
        """End all ranks. Never raises; may be called again."""


class Grammars(Protocol):
    """Follows outputs that must obey a grammar. Only `poll` blocks."""

    words: int  # the number of 32-bit words in a row of a mask

    def follow(self, seq: int, grammar: str, output: Ids = ()) -> None:
        """Start to follow an output, given its tokens so far. A Verdict comes in any case."""

    def ask(self, asks: Sequence[GrammarAsk]) -> None:
        """Pass on new tokens. A Verdict comes for each output that is followed."""

    def forget(self, seqs: Sequence[int]) -> None:
        """Stop to follow these sequences, if they are followed."""

    @property
    def pending(self) -> bool:
        """True if a Verdict has been asked for and has not come."""

    def poll(self, timeout: float) -> list[Verdict]:
        """Return the verdicts that have come, after a wait of up to `timeout` seconds for the first."""

    def close(self) -> None: ...


class EngineClient(Protocol):
    """One engine, in this process or in another."""

    def add(self, request: EngineRequest) -> None:
        """Add a request. Its last update has `finish` set, unless the engine fails."""

    def abort(self, seqs: Sequence[int]) -> None:
        """End these sequences. Unknown and ended ones are ignored."""

    def updates(self, timeout: float) -> list[SeqUpdate]:
        """Return the updates since the last call, after a wait of up to `timeout` seconds for the first.

        Raises:
            EngineError: the engine has failed, and no more updates will come.
        """

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Engine(EngineClient, Protocol):
    """An engine whose activity and prefix cache its client may change, too."""

    def become(self, activity: Activity) -> None:
        """Change the activity: pause, resume, free memory or allocate it again. Returns when that is done.

        Raises:
            UserError: the change is not possible, and nothing has changed.
            EngineError: the engine has failed.
        """

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        """Empty the prefix cache. With `running`, running requests are preempted and compute their blocks again."""


class Recorder(Protocol):
    """Records the events in the life of each request, for metrics. All calls come from one thread."""

    def added(self, request: EngineRequest) -> None:
        """Record a new request, which came at `request.arrival`."""

    def dealt(self, seq: int, replica: int) -> None:
        """Record that a replica has got the request. After a failure this happens again."""

    def updated(self, replica: int, update: SeqUpdate) -> None:
        """Record an update that the client gets. The last one has `finish` set."""

    def stopped(self, seq: int) -> None:
        """Record that the output has reached a stop text. Its last update will be that of an aborted request."""

    def ended(self, update: SeqUpdate) -> None:
        """Record that the request was refused, aborted or given up before a replica ended it."""


class Lockstep(Protocol):
    """Replicas whose ranks exchange tensors within a step, so that all of them launch every step, even without work.

    Each replica launches as many steps as the one that is furthest ahead, and a replica with work goes ahead. So when
    no replica has work, all are idle after the same number of steps.
    """

    def launched(self, count: int) -> None:
        """Tell the other replicas that this one has launched `count` steps so far."""

    def due(self) -> int:
        """Return how many steps the replica that is furthest ahead has launched. Never blocks.

        Raises:
            EngineError: another replica has failed; the error names it.
        """


class Policy(Protocol):
    """The order of requests: the request with the lowest key is served first, and the highest is preempted first."""

    def sort_key(self, request: EngineRequest, arrival: int) -> tuple[int, ...]: ...
