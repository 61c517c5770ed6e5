"""The table of unfinished requests: which of them run, and what was counted."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from shoal.engine.request import Request, RequestState
from shoal.engine.scheduler.block_tables import BlockTables
from shoal.errors import EngineError


@dataclass(slots=True)
class Counters:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_by_position: list[int] = field(default_factory=list)

    def count_drafts(self, proposed: int, accepted: int) -> None:
        """Count the drafts of one request in one step."""
        self.drafts += 1
        self.draft_tokens += proposed
        self.accepted_tokens += accepted
        by_position = self.accepted_by_position
        by_position += [0] * (accepted - len(by_position))
        for position in range(accepted):
            by_position[position] += 1


class RequestTable:
    """All requests that have not ended. Running requests have a block table, and the ranks know them."""

    def __init__(self, tables: BlockTables) -> None:
        self.counters = Counters()
        self._tables = tables
        self._requests: dict[int, Request] = {}
        self._running: list[Request] = []  # in the policy's order
        self._released: list[int] = []  # sequences that the ranks should forget

    @property
    def running(self) -> Sequence[Request]:
        """The running requests, in the policy's order."""
        return self._running

    @property
    def unfinished(self) -> Collection[int]:
        return self._requests.keys()

    @property
    def all(self) -> Collection[Request]:
        return self._requests.values()

    @property
    def num_waiting(self) -> int:
        return len(self._requests) - len(self._running)

    @property
    def is_empty(self) -> bool:
        """Return whether there is no request, and no sequence that the ranks should forget."""
        return not self._requests and not self._released

    @property
    def has_released(self) -> bool:
        return bool(self._released)

    def find(self, seq: int) -> Request | None:
        return self._requests.get(seq)

    def add(self, request: Request) -> None:
        self._requests[request.message.seq] = request

    def remove(self, request: Request) -> None:
        """Take out a request that has ended."""
        self.stop(request)
        request.state = RequestState.FINISHED
        del self._requests[request.message.seq]

    def start(self, request: Request, prefix: list[int]) -> None:
        """Make a request run. `prefix`: the cached blocks that it starts from."""
        self._tables.open(request, prefix)
        request.state = RequestState.RUNNING
        self._running.append(request)
        self._running.sort(key=lambda running: running.sort_key)

    def stop(self, request: Request) -> None:
        """Remove a request from the running ones, if it is running, and have the ranks forget it."""
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            self._released.append(request.message.seq)
            self._tables.close(request)

    def take_released(self) -> tuple[int, ...]:
        """Return the sequences that the ranks should forget with the next plan, each once."""
        released = tuple(self._released)
        self._released.clear()
        return released

    def audit(self) -> None:
        """Compare the lists of requests with their states, and block tables with the pool.

        Raises:
            EngineError: a block or a request was lost.
        """
        self._tables.audit(self._running)
        states = {RequestState.RUNNING: len(self._running), RequestState.FINISHED: 0}
        for state, count in states.items():
            found = sum(request.state is state for request in self._requests.values())
            if found != count:
                raise EngineError(f"the scheduler lists {count} {state.value} requests, but {found} have this state")
