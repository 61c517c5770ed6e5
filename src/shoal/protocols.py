"""The seams of the engine, without implementations."""

from collections.abc import Collection, Sequence
from typing import Protocol

from shoal.activity import Activity
from shoal.wire.base import Ids
from shoal.wire.engine import EngineRequest, EngineStats, ResetOutcome, SeqUpdate
from shoal.wire.grammars import GrammarAsk, Verdict
from shoal.wire.ranks import StepMask, StepPlan, StepResult
from shoal.wire.trace import TraceEvents


class Executor(Protocol):
    """Starts ranks and carries messages to and from them. tests/support/fakes.py has a fake of a few lines.

    After a `RanksDied` the owner calls `reform`, `fail` or `close`; all other methods raise the error again.
    """

    num_blocks: int  # KV blocks that every rank holds, agreed on at start
    start_times: dict[str, float]  # start phase -> seconds

    def launch(self, plan: StepPlan) -> None:
        """Send a plan to every rank, in the order of the calls. Never blocks.

        Raises:
            EngineError: a rank has failed.
        """

    def mask(self, mask: StepMask) -> None:
        """Send the mask of the plan that was launched last. Never blocks.

        Raises:
            EngineError: a rank has failed.
        """

    def poll(self, timeout: float) -> list[StepResult]:
        """Return the results that have arrived. Wait up to `timeout` seconds for the first.

        Raises:
            EngineError: a rank died, stood still or reported an error.
        """

    def call(self, verb: str, payload: bytes = b"", *, timeout: float) -> list[bytes]:
        """Have every rank do `verb` after all plans launched so far. Return the answers in the order of the ranks.

        Raises:
            EngineError: a rank died, stood still or reported an error.
        """

    def reform(self, incarnation: int, missing: Collection[str]) -> None:
        """Begin to replace the ranks named by a `RanksDied` that a method here has raised; `poll` goes on with it.

        Steps and calls that are not answered are lost. The other ranks forget all sequences and keep their memory.

        Args:
            incarnation: the one of all plans from now on; it is larger than the one before.
            missing: the parts of memory (`shoal.activity`) that no rank has when this is done.

        Raises:
            EngineError: the ranks cannot be replaced.
        """

    @property
    def reforming(self) -> bool:
        """Return whether ranks are being replaced. Until this is done no plan may be launched."""

    def fail(self, why: str) -> None:
        """End every rank immediately, and refuse all later calls with this reason. Never raises."""

    def close(self) -> None:
        """End every rank. Idempotent, never raises."""


class Grammars(Protocol):
    """Follows outputs that must obey a grammar. Only `poll` may block."""

    words: int  # 32-bit words in a row of a mask

    def follow(self, seq: int, grammar: str, output: Ids = ()) -> None:
        """Begin to follow an output that has the tokens `output` so far. A `Verdict` comes in any case."""

    def ask(self, asks: Sequence[GrammarAsk]) -> None:
        """Report new tokens. A `Verdict` comes for each of these outputs that is followed."""

    def forget(self, seqs: Sequence[int]) -> None:
        """Stop following outputs. Outputs that are not followed are ignored."""

    @property
    def pending(self) -> bool:
        """Return whether a `Verdict` will come."""

    def poll(self, timeout: float) -> list[Verdict]:
        """Return the verdicts that have come. Wait up to `timeout` seconds for the first."""

    def close(self) -> None: ...


class EngineClient(Protocol):
    """An engine, in this process or in another."""

    def add(self, request: EngineRequest) -> None:
        """Add a request. Every request ends with an update that has `finish` set, unless the engine fails."""

    def abort(self, seqs: Sequence[int]) -> None:
        """End requests. Requests that have ended, or never existed, are ignored."""

    def updates(self, timeout: float) -> list[SeqUpdate]:
        """Return the new updates of requests. Wait up to `timeout` seconds for the first.

        Raises:
            EngineError: the engine has failed; no more updates will come.
        """

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class TracedClient(Protocol):
    """An engine that can record a trace of what it and its ranks do."""

    def begin_trace(self, limit: int) -> None:
        """Record from now on, until about `limit` events are recorded.

        Raises:
            EngineError: the engine has failed.
        """

    def take_trace(self) -> list[TraceEvents]:
        """Return what was recorded since the last call, as far as it is known here. Waits for ranks at most.

        Raises:
            EngineError: the engine has failed.
        """

    def end_trace(self) -> list[TraceEvents]:
        """End the recording, and return the rest of it. Does nothing if there is none.

        Raises:
            EngineError: the engine has failed.
        """


class Engine(EngineClient, TracedClient, Protocol):
    """An engine client that can also pause the engine, put it to sleep, empty its prefix cache and trace it."""

    def set_activity(self, activity: Activity) -> None:
        """Pause, resume, free memory or allocate it again, and wait until this is done.

        Raises:
            UserError: the engine can't change to this activity; it is as before.
            EngineError: the engine has failed.
        """

    def reset_prefix_cache(self, *, running: bool = False) -> ResetOutcome:
        """Empty the prefix cache. `running`: also preempt the running requests, so that they free their blocks."""


class Recorder(Protocol):
    """A recorder of the events of requests, for metrics. All calls come from one thread."""

    def added(self, request: EngineRequest) -> None:
        """A request has arrived, at the time `request.arrival`."""

    def dispatched(self, seq: int, replica: int) -> None:
        """A request was given to a replica; after a failure it may be given to another or to the same again."""

    def updated(self, replica: int, update: SeqUpdate) -> None:
        """A client gets an update; it is the last one if `finish` is set."""

    def stopped(self, seq: int) -> None:
        """An output has reached a stop text. The request is aborted; its last update is still to come."""

    def ended(self, update: SeqUpdate) -> None:
        """A request has ended without an update of a replica: it was refused, aborted or given up."""


class Peers(Protocol):
    """The replicas whose ranks form groups with the ranks of an executor, because they share experts."""

    def check(self) -> None:
        """Do nothing, unless the other replicas need this one to form its groups anew. Never blocks.

        Raises:
            RanksDied: ranks of another replica have died; the error names none of this one.
            EngineError: another replica has failed; the message names it.
        """

    def formed(self) -> bool:
        """Tell the others that the ranks of this replica are ready again, and return whether those of all replicas are.

        Raises:
            EngineError: another replica has failed.
        """

    @property
    def all_awake(self) -> bool:
        """Return whether all replicas have begun the reform with all of their memory. All get the same answer."""


class Lockstep(Peers, Protocol):
    """A replica's end of a lockstep: replicas whose ranks exchange tensors within a step all launch the same steps.

    Each replica launches as many steps as the replica that has launched most, if need be without work of its own. A
    replica with work launches further steps. So when no replica has work, all rest after the same number of steps.

    When ranks of one replica die, the ranks of all replicas form their groups anew: a reform. Like a step, a reform
    that one replica has begun is begun by all. Each has a larger incarnation, in which steps are counted from 0 on.
    """

    @property
    def incarnation(self) -> int:
        """The incarnation in which this replica computes or forms its groups. All replicas begin with the same one."""

    def launched(self, count: int) -> None:
        """Tell the other replicas that this replica has launched `count` steps in this incarnation."""

    def steps_due(self) -> int:
        """Return how many steps this replica must have launched: the most that any replica has. Never blocks.

        Raises:
            EngineError: another replica has failed; the message names it.
        """

    def begin_reform(self, why: str, *, awake: bool) -> int:
        """Begin a reform, and tell the other replicas. Return its incarnation, which is larger than the one before.

        Args:
            why: how ranks of this replica have died; "": follow the reform that another replica has begun.
            awake: False if the ranks of this replica lack a part of their memory.

        Raises:
            EngineError: another replica has failed.
        """


class Policy(Protocol):
    """The order of requests: the one with the lowest key is served first, the one with the highest is preempted."""

    def sort_key(self, request: EngineRequest, arrival: int) -> tuple[int, ...]: ...
